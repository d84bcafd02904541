// The thin layer between C++ and Lua: functions with help texts behind one guard, typed arguments, userdata that hold C++ values.
// Lua is compiled as C++: lua_error throws, so destructors run; and a moe::Error may be thrown from any binding, because the
// guard turns it into Lua's error object. A binding is `int f(lua_State*)` with its arguments from stack index 1 on.
#pragma once
#include "core/base/error.h"

#include <lua.hpp>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
#include <span>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

using Function = int (*)(lua_State*);

/// One function as Lua sees it. `help` is what help(f) prints: signature, meaning, units. Lists of them must be static.
struct Binding {
    const char* name;
    Function function;
    const char* help;
};

// --- functions and errors ---

/// Pushes a guarded function called `full_name` in errors, with its help text registered. The top `num_upvalues` values (0 to 4)
/// become its upvalues, which it reads from upvalue(1) on.
void push_function(lua_State* L, const Binding& binding, const std::string& full_name, int num_upvalues = 0);
/// Pseudo-index of an upvalue of the running binding: the guard keeps the first two for itself.
constexpr int upvalue(int i) { return lua_upvalueindex(i + 2); }
/// As push_function, but pushes a table that is called like the function: room for fields beside it (moe.kernels.rmsnorm.reference). `index` gives
/// fields that are made on first use; it is called with the table and the key, and its upvalue(1) is the table's full name.
void push_callable(lua_State* L, const Binding& binding, const std::string& full_name, const Binding& index);
/// Sets functions as fields of the table on the stack's top; `prefix` is put before the names in errors ("moe.", "moe.fs.").
void set_functions(lua_State* L, const std::string& prefix, std::span<const Binding> bindings);
/// Name of the binding that runs, e.g. "tensor:matmul", "tensor:__add"; "lua" outside of one.
std::string running_binding(lua_State* L);
/// The same as a script writes it: "tensor + …", "run.lr = …".
std::string running(lua_State* L);
/// What the guard is to C++, for functions written in Lua: errors that are plain texts ("attempt to index a nil value") come out of them as error objects.
/// Replaces the function on the stack's top; of a table there the functions that have a help text, and names that it does not have are errors from then on (rawget asks).
void guard_module(lua_State* L);
/// The same for the methods and operators of a type written in Lua: a metatable with `__methods`, on the stack's top.
void guard_type(lua_State* L);
/// Pushes the Lua function behind a guarded one, else the value at `index` itself.
void push_unguarded(lua_State* L, int index);
/// Registers a help text for the value at `index` (a function, a table or a userdata), under a name.
void set_help(lua_State* L, int index, const std::string& name, const std::string& text);
/// Pushes the registry table name → function or module of everything that has a help text.
void push_help_names(lua_State* L);
/// Help text of the value at index; nothing where it has none.
std::optional<std::string> help_of(lua_State* L, int index);

/// Pushes Lua's error object {kind, op, got, want, hint, where, rank, traceback}. Where a Lua function is on the stack, `where`
/// is its file and line: the cause is there, not in the check.
void push_error(lua_State* L, const ErrorParts& parts);
/// The error object (or any other value that was raised: kind lua) at index as parts.
ErrorParts error_parts(lua_State* L, int index);
/// True for a table that push_error made.
bool is_error(lua_State* L, int index);
/// What the guard adds to LibTorch's errors: the call's tensors as text, "float32 [2, 3] cpu, int64 [4] cpu"; "" without any. Set by open_tensor.
inline std::string (*describe_arguments)(lua_State* L) = nullptr;
/// "file.lua:12" of the innermost Lua function on the stack, one of moe's own modules only where there is no other; "" where there is none.
std::string lua_place(lua_State* L);
/// For message handlers: what was raised, alone on the stack at index 1, becomes the error object with its place and the traceback of the stack that raised it.
void add_traceback_to_error(lua_State* L);
/// The parts of whatever C++ exception is being handled: moe::Error as it is, LibTorch's and others with the first line of their
/// message. Call it inside catch. Rethrows what is not a std::exception (Lua's own).
ErrorParts current_exception_parts();

// --- values ---

/// A value as a message shows it: `"text"`, `3`, `nil`, `a table`, `a tensor`.
std::string got_text(lua_State* L, int index);
/// Throws (usage): argument `index`, called `name`, is not what was wanted.
[[noreturn]] void bad_argument(lua_State* L, int index, const char* name, const std::string& want, const std::string& hint = {});

bool is_nothing(lua_State* L, int index);
/// Integers; floats without a fraction are accepted (2^17 is a float in Lua).
int64_t check_integer(lua_State* L, int index, const char* name);
double check_number(lua_State* L, int index, const char* name);
bool check_bool(lua_State* L, int index, const char* name);
std::string check_string(lua_State* L, int index, const char* name);
void check_table(lua_State* L, int index, const char* name);
/// A function, or an object that is called like one.
void check_function(lua_State* L, int index, const char* name);
/// A table of integers {4, 8}.
std::vector<int64_t> check_integers(lua_State* L, int index, const char* name);
/// Text of any value as tostring gives it; the stack is left as it was.
std::string to_string(lua_State* L, int index);
void push_string(lua_State* L, std::string_view text);
void push_integers(lua_State* L, std::span<const int64_t> values);
/// Pushes an empty table whose pairs iterate in the order in which `names` lists its keys.
void push_ordered_table(lua_State* L, const std::vector<std::string>& names);
/// The string keys of a table in pairs' order: that of push_ordered_table, else sorted.
std::vector<std::string> ordered_keys(lua_State* L, int index);
/// A sorted pairs() for plain tables: integers ascending, then texts in byte order, then the rest. The Lua function itself.
int sorted_pairs(lua_State* L);
/// `f` for each item that sorted_pairs gives of the table at `index`, in its order: key and value are at -2 and -1, and stay there.
void each_sorted(lua_State* L, int index, const std::function<void()>& f);

/// Named arguments in a table: run:evaluate { max_batches = 4 }. Unknown names throw (usage) with the nearest.
class Options {
public:
    /// The table at index; nil or none gives no options.
    Options(lua_State* L, int index, std::initializer_list<const char*> known);
    bool has(const char* name) const;
    int64_t integer(const char* name, int64_t fallback) const;
    double number(const char* name, double fallback) const;
    bool boolean(const char* name, bool fallback) const;
    std::string string(const char* name, const std::string& fallback) const;
    /// Pushes the value (nil where there is none).
    void push(const char* name) const;
    lua_State* state() const { return L_; }

private:
    lua_State* L_;
    int index_;     ///< 0: no table
};

// --- userdata ---

/// Lua's name of a boxed C++ type: specialise with `static constexpr const char* value`.
template <class T>
struct TypeName;
/// The registry's key of a type's metatable is the address of this: quicker to look up than a name. Not const, so that no linker makes two of them one.
template <class T>
struct TypeKey {
    static inline char key = 0;
};

/// A userdata type. Methods are called as x:name(…), fields read as x.name; both have help texts. Unknown names are errors with
/// the nearest one, unless `index` (a fallback, called with object and key) gives a value, nil included; none means unknown.
struct Type {
    const char* name;
    const char* help;
    std::span<const Binding> methods, fields, meta;
    Function index = nullptr;
};
/// Registers a type's metatable; `gc` destroys the box.
void register_type(lua_State* L, const Type& type, Function gc);

/// What a userdata holds. Empty after free() or __close.
template <class T>
using Box = std::optional<T>;

/// Pushes a value as userdata.
template <class T>
T& push(lua_State* L, T value) {
    auto* box = new (lua_newuserdatauv(L, sizeof(Box<T>), 1)) Box<T>(std::move(value));
    lua_rawgetp(L, LUA_REGISTRYINDEX, &TypeKey<T>::key);
    lua_setmetatable(L, -2);
    return **box;
}
/// The box at index, null where the value is something else.
template <class T>
Box<T>* test_box(lua_State* L, int index) {
    void* box = lua_touserdata(L, index);
    if (!box || !lua_getmetatable(L, index)) return nullptr;
    lua_rawgetp(L, LUA_REGISTRYINDEX, &TypeKey<T>::key);
    bool same = lua_rawequal(L, -1, -2);
    lua_pop(L, 2);
    return same ? static_cast<Box<T>*>(box) : nullptr;
}
/// The value at index. Throws (usage) for another type, (state) for a freed one.
template <class T>
T& check(lua_State* L, int index, const char* name) {
    auto* box = test_box<T>(L, index);
    if (!box) bad_argument(L, index, name, std::string("a ") + TypeName<T>::value, index == 1 ? "call methods with a colon: x:method(…)" : "");
    if (!*box) MOE_THROW(state, running(L), std::string("a ") + TypeName<T>::value + " that was freed", "a live one", "it ended with :free() or its <close> scope");
    return **box;
}
template <class T>
int collect(lua_State* L) {
    auto* box = test_box<T>(L, 1);
    if (!box) bad_argument(L, 1, "self", std::string("a ") + TypeName<T>::value, "call methods with a colon: x:free()");
    box->reset();
    return 0;
}
template <class T>
void register_type(lua_State* L, Type type) {
    type.name = TypeName<T>::value;
    register_type(L, type, &collect<T>);
    luaL_getmetatable(L, type.name);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &TypeKey<T>::key);
}
template <class T>
T& self(lua_State* L) {
    return check<T>(L, 1, "self");
}

}  // namespace moe::lua

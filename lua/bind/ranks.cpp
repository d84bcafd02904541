#include "lua/bind/ranks.h"

#include "core/base/random.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"
#include "lua/bind/ranks_calls.h"
#include "lua/bind/script.h"

#include <cstring>

namespace moe::lua {
namespace {
using train::Word;
constexpr double kErrorSecs = 60;           // others may be in a long step; who never comes waits for this rank in a collective
constexpr size_t kMostText = 60;

// --- plain values as bytes ---

constexpr int kMostDepth = 50;

template <class T>
void append(std::string& out, T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
template <class T>
T take(const std::string& bytes, size_t& at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    at += sizeof value;
    return value;
}

/// Throws (usage) for what has no meaning in another process.
void pack_value(lua_State* L, int index, std::string& out, int depth = 0) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 4, "values");
    int type = lua_type(L, index);
    out.push_back(char(type == LUA_TNUMBER && lua_isinteger(L, index) ? 'i' : '0' + type));
    if (type == LUA_TNIL) return;
    if (type == LUA_TBOOLEAN) return out.push_back(char(lua_toboolean(L, index)));
    if (type == LUA_TNUMBER) return lua_isinteger(L, index) ? append(out, lua_tointeger(L, index)) : append(out, lua_tonumber(L, index));
    if (type == LUA_TSTRING) {
        size_t size = 0;
        const char* data = lua_tolstring(L, index, &size);
        append(out, uint64_t(size));
        out.append(data, size);
        return;
    }
    MOE_CHECK(type == LUA_TTABLE && depth < kMostDepth, usage, running(L) + ": result", depth < kMostDepth ? got_text(L, index) : "a table inside itself", "numbers, texts, booleans and tables of them",
              "results go to all ranks: end the function without a return, or return what can go");
    size_t place = out.size();
    append(out, uint64_t(0));
    uint64_t count = 0;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        pack_value(L, -2, out, depth + 1);
        pack_value(L, -1, out, depth + 1);
        lua_pop(L, 1);
        ++count;
    }
    std::memcpy(out.data() + place, &count, sizeof count);
}

void push_value(lua_State* L, const std::string& bytes, size_t& at) {
    luaL_checkstack(L, 4, "values");
    char type = bytes[at++];
    if (type == 'i') return lua_pushinteger(L, take<lua_Integer>(bytes, at));
    switch (type - '0') {
        case LUA_TNIL: return lua_pushnil(L);
        case LUA_TBOOLEAN: return lua_pushboolean(L, bytes[at++]);
        case LUA_TNUMBER: return lua_pushnumber(L, take<lua_Number>(bytes, at));
        case LUA_TSTRING: {
            auto size = take<uint64_t>(bytes, at);
            push_string(L, std::string_view(bytes).substr(at, size));
            at += size;
            return;
        }
        default: {
            auto count = take<uint64_t>(bytes, at);
            lua_newtable(L);
            for (uint64_t i = 0; i < count; ++i) {
                push_value(L, bytes, at);
                push_value(L, bytes, at);
                lua_rawset(L, -3);
            }
        }
    }
}
}  // namespace

std::string pack_from(lua_State* L, int first) {
    std::string out;
    for (int i = first, n = lua_gettop(L); i <= n; ++i) pack_value(L, i, out);
    return out;
}

int push_all(lua_State* L, const std::string& bytes) {
    int n = 0;
    for (size_t at = 0; at < bytes.size(); ++n) push_value(L, bytes, at);
    return n;
}

// --- meetings ---

std::string at_place(lua_State* L, const std::string& what) {
    std::string place = lua_place(L);
    return place.empty() ? what : what + " at " + place;
}

namespace {
/// Numbers, texts and booleans as they are, those in tables of options too: what may be different in silence is only what cannot be compared.
std::string argument_text(lua_State* L, int index, bool inside) {
    int type = lua_type(L, index);
    if (type == LUA_TTABLE && !inside && !lua_rawlen(L, index)) {
        std::string text;
        lua_pushcfunction(L, sorted_pairs);
        lua_pushvalue(L, index);
        if (lua_getmetatable(L, -1)) return lua_pop(L, 3), "…";
        lua_call(L, 1, 3);
        int iterate = lua_absindex(L, -3);
        for (;;) {
            lua_pushvalue(L, iterate);
            lua_pushvalue(L, iterate + 1);
            lua_pushvalue(L, iterate + 2);
            lua_call(L, 2, 2);
            if (lua_isnil(L, -2)) break;
            if (lua_type(L, -2) == LUA_TSTRING) text += (text.empty() ? "" : ", ") + to_string(L, -2) + " = " + argument_text(L, lua_gettop(L), true);
            lua_pop(L, 1);
            lua_replace(L, iterate + 2);
        }
        lua_settop(L, iterate - 1);
        return "{" + text + "}";
    }
    if (type == LUA_TNUMBER || type == LUA_TBOOLEAN || type == LUA_TNIL) return to_string(L, index);
    if (type != LUA_TSTRING) return "…";
    std::string text = to_string(L, index);
    return '"' + (text.size() > kMostText ? text.substr(0, kMostText - 3) + "…" : text) + '"';
}

uint64_t mixed(uint64_t a, uint64_t b) {
    a = (a ^ (b + 0x9e3779b97f4a7c15u + (a << 6) + (a >> 2))) * 0xff51afd7ed558ccdu;
    return a ^ (a >> 32);
}
/// Of a plain value, in whatever order a table has its keys. What cannot be compared, functions and tensors, counts by its type.
uint64_t digest_of(lua_State* L, int index, int depth) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 4, "values");
    int type = lua_type(L, index);
    auto sum = uint64_t(type);
    if (type == LUA_TBOOLEAN) return mixed(sum, uint64_t(lua_toboolean(L, index)));
    if (type == LUA_TNUMBER) {
        lua_Number x = lua_tonumber(L, index);
        if (lua_isinteger(L, index)) return mixed(sum + 100, uint64_t(lua_tointeger(L, index)));
        uint64_t bits = 0;
        if (x == x) std::memcpy(&bits, &x, sizeof bits);      // any nan is like another
        return mixed(sum, bits);
    }
    if (type == LUA_TSTRING) return mixed(sum, hash_name(to_string(L, index)));
    if (type != LUA_TTABLE || depth >= kMostDepth) return sum;
    if (lua_getmetatable(L, index)) return lua_pop(L, 1), sum;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        sum += mixed(digest_of(L, -2, depth + 1), digest_of(L, -1, depth + 1));
        lua_pop(L, 1);
    }
    return mixed(sum, 1);
}
/// Of all arguments, also of what call_text leaves out.
uint64_t digest_of_call(lua_State* L) {
    uint64_t sum = 0;
    for (int i = running(L).find(':') != std::string::npos ? 2 : 1, n = lua_gettop(L); i <= n; ++i) sum = mixed(sum, digest_of(L, i, 0));
    return sum;
}
}  // namespace

std::string call_text(lua_State* L) {
    int n = lua_gettop(L);
    luaL_checkstack(L, 10, "arguments");
    std::string name = running(L), text;
    bool method = name.find(':') != std::string::npos;
    for (int i = method ? 2 : 1; i <= n; ++i) text += (text.empty() ? "" : ", ") + argument_text(L, i, false);
    return name + "(" + text + ")";
}

namespace {
std::vector<Word> hear(lua_State* L, train::Meeting& ranks, const Word& mine) {
    double limit = mine.error ? kErrorSecs : 0;
    std::optional<std::vector<Word>> words;
    if (!mine.error || !ranks.is_broken()) {
        Unlocked unlocked(L);
        words = ranks.hear(mine, limit);
    }
    if (words) return *words;
    ErrorParts parts = *mine.error;
    if (parts.rank < 0) parts.rank = ranks.rank();
    throw Error(parts);
}

/// This rank's error becomes everybody's, or another's that of this one.
[[noreturn]] void settle_error(lua_State* L, train::Meeting& ranks, const std::string& place, const ErrorParts& error) {
    Word mine{place, "", error};
    if (error.traceback.empty()) {                // for ranks that are elsewhere
        if (std::string at = lua_place(L); !at.empty()) mine.error->where = at;
        luaL_traceback(L, L, nullptr, 0);
        mine.error->traceback = to_string(L, -1);
        lua_pop(L, 1);
    }
    ErrorParts common = error;
    try {
        train::judge(hear(L, ranks, mine));
    } catch (const Error& e) {
        if (!train::is_agreed(error)) common = e.parts();  // what all raise alike looks as on one rank
    }
    throw Error(common);
}
}  // namespace

train::Meeting* ranks_of(lua_State* L) {
    Control& c = control(L);
    return c.alone ? nullptr : c.ranks.get();
}

Alone::Alone(lua_State* L) : depth_(control(L).alone) { ++depth_; }
Alone::~Alone() { --depth_; }

void meet(lua_State* L) {
    Control& c = control(L);
    if (!c.ranks) return;
    MOE_CHECK(!c.alone, state, running(L), fmt::format("rank {} alone", c.ranks->rank()), "a call of all ranks", "in moe.on and in hooks there is only what one rank can do by itself");
    Word mine{at_place(L, call_text(L))};
    mine.digest = digest_of_call(L);
    if (c.interrupted) mine.error = ErrorParts{ErrorKind::interrupted, "interrupted", "", "", "", "", -1, ""};
    train::judge(hear(L, *c.ranks, mine));
}

int call_on_all_ranks(lua_State* L, const std::function<int(lua_State*)>& f) {
    if (!control(L).ranks) return f(L);
    meet(L);
    train::forget_agreed();
    std::optional<ErrorParts> error;
    try {
        return f(L);
    } catch (const std::exception&) {
        error = current_exception_parts();
    }
    if (train::is_agreed(*error)) throw Error(*error);
    settle_error(L, *control(L).ranks, at_place(L, running(L) + ", which failed,"), *error);
}

namespace {
/// Stack: a light userdata, arguments.
int call_settled(lua_State* L) {
    auto& f = *static_cast<const std::function<void(lua_State*)>*>(lua_touserdata(L, 1));
    lua_remove(L, 1);
    try {
        f(L);
        return 0;
    } catch (const std::exception&) {
        push_error(L, current_exception_parts());
    }
    return lua_error(L);
}
}  // namespace

std::optional<ErrorParts> caught(lua_State* L, int num_arguments, const std::function<void(lua_State*)>& f) {
    lua_pushcfunction(L, call_settled);
    lua_insert(L, -(num_arguments + 1));
    lua_pushlightuserdata(L, const_cast<std::function<void(lua_State*)>*>(&f));
    lua_insert(L, -(num_arguments + 1));
    try {
        call_protected(L, num_arguments + 1, 0);
    } catch (const Error& e) {
        return e.parts();
    }
    return std::nullopt;
}

void settle(lua_State* L, int num_arguments, const std::string& what, const std::function<void(lua_State*)>& f) {
    train::forget_agreed();
    auto error = caught(L, num_arguments, f);
    train::Meeting* ranks = ranks_of(L);
    if (error && (!ranks || train::is_agreed(*error))) throw Error(*error);
    if (error) settle_error(L, *ranks, at_place(L, what), *error);
    if (ranks) train::judge(hear(L, *ranks, {at_place(L, what)}));
}

std::string from_rank_0(lua_State* L, const std::string& what, const std::function<std::string()>& f) {
    train::Meeting* ranks = ranks_of(L);
    if (!ranks) return f();
    Word mine{at_place(L, what)};
    if (ranks->rank() == 0) {
        Alone alone(L);
        try {
            mine.value = f();
        } catch (const std::exception&) {
            mine.error = current_exception_parts();
        }
    }
    auto words = hear(L, *ranks, mine);
    bool others = std::any_of(words.begin() + 1, words.end(), [&](const Word& w) { return w.error || w.place != mine.place; });
    if (words[0].error && !others) {                        // as on one rank
        train::note_agreed(*words[0].error);
        throw Error(*words[0].error);
    }
    train::judge(words);
    return words[0].value;
}

// --- sessions ---

std::shared_ptr<train::Meeting> open_meeting() {
    const dist::Group& world = dist::world();
    return world.size() > 1 ? std::make_shared<train::Meeting>(world.duplicate()) : nullptr;
}

std::vector<std::string> exchange(train::Meeting& ranks, const std::string& place, const std::string& mine, double limit_secs) {
    std::vector<std::string> values;
    auto words = ranks.hear({place, mine}, limit_secs);
    for (size_t r = 0; words && r < words->size(); ++r) values.push_back((*words)[r].value);
    return values;
}

bool end_on_all_ranks(lua_State* L, const std::string& what, std::optional<ErrorParts>& error, double limit_secs) {
    static const std::string kEndOf = "the end of ";
    train::Meeting& ranks = *control(L).ranks;
    for (bool together = false; !together;) {
        std::optional<std::vector<Word>> words;
        if (!ranks.is_broken()) {
            Unlocked unlocked(L);
            words = ranks.hear({kEndOf + what, "", error}, error ? limit_secs : 0);
        }
        if (!words) {
            if (!error) error = ErrorParts{ErrorKind::dist, "the ranks have lost each other", "a rank that did not come in time to a call of all", "all ranks", "", "", -1, ""};
            if (error->rank < 0) error->rank = ranks.rank();
            return false;
        }
        together = std::all_of(words->begin(), words->end(), [](const Word& w) { return w.place.starts_with(kEndOf); });
        try {
            train::judge(*words);
        } catch (const Error& e) {
            if (!error || !train::is_agreed(*error)) error = e.parts();
        }
    }
    train::forget_agreed();
    return true;
}

// --- moe.on ---

namespace {
int on(lua_State* L) {
    int64_t rank = check_integer(L, 1, "rank");
    check_function(L, 2, "f");
    Control& c = control(L);
    int64_t size = c.ranks ? c.ranks->size() : 1, own = c.ranks ? c.ranks->rank() : 0;
    MOE_CHECK(rank >= 0 && rank < size, usage, "moe.on: rank", std::to_string(rank), fmt::format("0 to {}", size - 1), "moe.num_ranks tells how many there are");
    MOE_CHECK(!c.alone || rank == own, state, "moe.on", fmt::format("rank {} inside of what rank {} does alone", rank, own), "a call of all ranks", "");
    lua_remove(L, 1);
    if (!c.ranks || c.alone) {
        lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
        return lua_gettop(L);
    }
    lua_pushinteger(L, rank);
    lua_insert(L, 1);
    meet(L);
    lua_remove(L, 1);
    Word mine{at_place(L, "the end of moe.on")};
    if (rank == own) {
        Alone alone(L);
        mine.error = caught(L, lua_gettop(L), [&](lua_State* S) {
            lua_call(S, lua_gettop(S) - 1, LUA_MULTRET);
            mine.value = pack_from(S, 1);
        });
    }
    auto words = hear(L, *c.ranks, mine);
    train::judge(words);
    lua_settop(L, 0);
    return push_all(L, words[size_t(rank)].value);
}

const Binding kFunctions[] = {
    {"on", on,
     "moe.on(rank, f, …): all ranks call it, f(…) runs on one of them alone, and the others wait. What f raises is raised on all ranks, with its rank. Results that are numbers, texts, booleans or tables of them are returned on all ranks. "
     "Inside f there is only what a rank can do by itself: no training, no saving. On one rank it is f(…).\nExample: print(moe.on(0, function() return moe.rank end))"},
};

/// A help text for a field that is a plain value: its name has it.
void document(lua_State* L, const char* name, const char* text) {
    lua_newtable(L);
    set_help(L, -1, name, text);
    lua_pop(L, 1);
}

}  // namespace

void open_ranks(lua_State* L) {
    Control& c = control(L);
    set_functions(L, "moe.", kFunctions);
    lua_pushinteger(L, c.ranks ? c.ranks->rank() : 0);
    lua_setfield(L, -2, "rank");
    lua_pushinteger(L, c.ranks ? c.ranks->size() : 1);
    lua_setfield(L, -2, "num_ranks");
    document(L, "moe.rank", "moe.rank: which of the processes of `moelab run --ranks N` this is, from 0; 0 for a single one. All run the same script; only rank 0 prints.");
    document(L, "moe.num_ranks", "moe.num_ranks: how many processes run this script; 1 without --ranks.");
    if (!c.ranks) return;
    share_moe_functions(L);
}
}  // namespace moe::lua

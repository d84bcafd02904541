#include "lua/bind/ranks.h"

#include "core/base/interrupt.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"
#include "lua/bind/job.h"
#include "lua/bind/ranks_calls.h"
#include "lua/bind/script.h"

#include <algorithm>

namespace moe::lua {
namespace {
using train::Word;
constexpr double kErrorSecs = 60;           // others may be in a long step; who never comes waits for this rank in a collective

// --- meetings ---

/// An interrupt that reached another rank is one of this rank, too: no pcall in a loop holds it up. A job's callbacks have none.
void heed_interrupt(lua_State* L, const Word& mine, const std::vector<Word>& words) {
    auto is_one = [](const Word& w) { return w.error && is_interruption(*w.error); };
    if (!is_one(mine) && std::any_of(words.begin(), words.end(), is_one) && &control(L) == &session_control(L)) interrupt(control(L));
}

std::vector<Word> hear(lua_State* L, train::Meeting& ranks, const Word& mine) {
    double limit = mine.error ? kErrorSecs : 0;
    std::optional<std::vector<Word>> words;
    if (!mine.error || !ranks.is_broken()) {
        Unlocked unlocked(L);
        words = ranks.hear(mine, limit);
    }
    if (words) return heed_interrupt(L, mine, *words), *words;
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

void meet(lua_State* L, Tensors tensors) {
    Control& c = control(L);
    if (!c.ranks) return;
    MOE_CHECK(!c.alone, state, running(L), fmt::format("rank {} alone", c.ranks->rank()), "a call of all ranks", "in moe.on and in hooks there is only what one rank can do by itself");
    Word mine{at_place(L, call_text(L))};
    mine.digest = digest_of_call(L, tensors == Tensors::own);
    if (c.interrupted) mine.error = interruption();
    train::judge(hear(L, *c.ranks, mine));
}

int call_on_all_ranks(lua_State* L, const std::function<int(lua_State*)>& f, Tensors tensors) {
    if (!control(L).ranks) return f(L);
    meet(L, tensors);
    train::forget_agreed();
    std::optional<ErrorParts> error;
    struct Deeper {
        int& depth;
        explicit Deeper(int& d) : depth(d) { ++depth; }
        ~Deeper() { --depth; }
    } deeper(control(L).calls);
    // Once more at f's first collective: a rank that has failed on the way there is in settle_error(), and the others would wait for it where nobody can call them back.
    dist::BeforeCollectives before([L] { train::judge(hear(L, *control(L).ranks, {at_place(L, running(L) + ", begun,")})); });
    try {
        LiveRun turn = turn_beside_job(L);
        return f(L);
    } catch (const std::exception&) {
        error = current_exception_parts();
    }
    if (train::is_agreed(*error)) throw Error(*error);
    settle_error(L, *control(L).ranks, at_place(L, running(L) + ", which failed,"), *error);
}

void throw_interrupted_on_all(lua_State* L) {
    interrupt(control(L));
    ErrorParts parts = interruption();
    train::note_agreed(parts);
    throw Error(parts);
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
/// moe.on("all", f, …).
int on_all(lua_State* L) {
    std::string who = check_string(L, 1, "rank");
    MOE_CHECK(who == "all", usage, "moe.on: rank", '"' + who + '"', "a rank, from 0, or \"all\"", "");
    check_function(L, 2, "f");
    MOE_CHECK(!control(L).ranks || ranks_of(L), state, "moe.on", fmt::format("all ranks inside of what rank {} does alone", control(L).ranks->rank()), "a call of all ranks", "");
    if (ranks_of(L)) meet(L, Tensors::own);
    lua_remove(L, 1);
    if (!ranks_of(L)) return lua_call(L, lua_gettop(L) - 1, LUA_MULTRET), lua_gettop(L);
    struct Kept {
        lua_State* L;
        int ref = LUA_NOREF;
        ~Kept() { luaL_unref(L, LUA_REGISTRYINDEX, ref); }
    } results{L};
    int n = 0;
    settle(L, lua_gettop(L), running(L), [&](lua_State* S) {
        lua_call(S, lua_gettop(S) - 1, LUA_MULTRET);
        n = lua_gettop(S);
        lua_createtable(S, n, 0);
        lua_insert(S, 1);
        for (int i = n; i > 0; --i) lua_rawseti(S, 1, i);
        results.ref = luaL_ref(S, LUA_REGISTRYINDEX);
    });
    lua_rawgeti(L, LUA_REGISTRYINDEX, results.ref);
    luaL_checkstack(L, n, "results");
    for (int i = 1; i <= n; ++i) lua_rawgeti(L, 1, i);
    return n;
}

int on(lua_State* L) {
    if (lua_type(L, 1) == LUA_TSTRING) return on_all(L);
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
    meet(L, Tensors::own);
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
     "Inside f there is only what a rank can do by itself: no training, no saving. On one rank it is f(…).\n"
     "moe.on(\"all\", f, …): f(…) runs on all ranks, with calls of all ranks inside, and returns what it does on each; what it raises on one of them is raised on all, so that after pcall(moe.on, \"all\", f) they go on alike.\nExample: print(moe.on(0, function() return moe.rank end))"},
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

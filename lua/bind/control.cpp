#include "lua/bind/control.h"

#include "core/base/interrupt.h"
#include "lua/bind/lua.h"

#include <omp.h>

namespace moe::lua {
namespace {
/// Stays armed until the end of the evaluation, so that a pcall in a loop cannot swallow the interrupt.
void stop_hook(lua_State* L, lua_Debug*) {
    push_error(L, interruption());
    lua_error(L);
}

void arm(lua_State* L) noexcept { lua_sethook(L, stop_hook, LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT, 1); }

/// Resumes `co` with n arguments from L's top; gives the number of results moved to L, −1 with the error object on top.
int resume(lua_State* L, lua_State* co, int n) {
    Control& c = control(L);
    if (!lua_checkstack(co, n)) return lua_pushliteral(L, "too many arguments to resume"), -1;
    lua_xmove(L, co, n);
    c.running = co;
    if (c.interrupted) arm(co);
    int count = 0, status = lua_resume(co, L, n, &count);
    c.running = L;
    if (c.interrupted) arm(L);
    if (status == LUA_OK || status == LUA_YIELD) {
        if (!lua_checkstack(L, count + 1)) {
            lua_pop(co, count);
            return lua_pushliteral(L, "too many results to resume"), -1;
        }
        lua_xmove(co, L, count);
        return count;
    }
    lua_xmove(co, L, 1);
    return -1;
}

int coroutine_resume(lua_State* L) {
    lua_State* co = lua_tothread(L, 1);
    if (!co) bad_argument(L, 1, "co", "a coroutine");
    int count = resume(L, co, lua_gettop(L) - 1);
    lua_pushboolean(L, count >= 0);
    lua_insert(L, count >= 0 ? -(count + 1) : -2);
    return count >= 0 ? count + 1 : 2;
}

int wrapped(lua_State* L) {
    lua_State* co = lua_tothread(L, lua_upvalueindex(1));
    int count = resume(L, co, lua_gettop(L));
    if (count >= 0) return count;
    int status = lua_status(co);
    if (status != LUA_OK && status != LUA_YIELD) {
        lua_resetthread(co);
    }
    if (lua_type(L, -1) == LUA_TSTRING) {
        luaL_where(L, 1);
        lua_insert(L, -2);
        lua_concat(L, 2);
    }
    return lua_error(L);
}

int coroutine_wrap(lua_State* L) {
    check_function(L, 1, "f");
    lua_State* co = lua_newthread(L);
    lua_pushvalue(L, 1);
    lua_xmove(L, co, 1);
    lua_pushcclosure(L, wrapped, 1);
    return 1;
}

const Binding kCoroutines[] = {
    {"resume", coroutine_resume, "coroutine.resume(co, …): as in Lua; an interrupt reaches the coroutine."},
    {"wrap", coroutine_wrap, "coroutine.wrap(f): as in Lua; an interrupt reaches the coroutine."},
};
}  // namespace

void throw_if_interrupted(lua_State* L) {
    if (control(L).interrupted) throw Error(interruption());
}

void StateLock::lock() { take(1); }

void StateLock::take(int depth) {
    if (depth == 0) return;
    std::unique_lock guard(mutex_);
    auto me = std::this_thread::get_id();
    if (depth_ == 0 || owner_ != me) {
        uint64_t ticket = next_ticket_++;
        free_.wait(guard, [&] { return depth_ == 0 && serving_ == ticket; });
        ++serving_;
        owner_ = me;
    }
    depth_ += depth;
}

void StateLock::release(int depth) {
    {
        std::lock_guard guard(mutex_);
        depth_ -= depth;
        if (depth_ > 0) return;
        owner_ = {};
    }
    free_.notify_all();
}

bool StateLock::is_mine() {
    std::lock_guard guard(mutex_);
    return depth_ > 0 && owner_ == std::this_thread::get_id();
}

int StateLock::release_all() {
    int depth = 0;
    {
        std::lock_guard guard(mutex_);
        if (owner_ != std::this_thread::get_id()) return 0;
        std::swap(depth, depth_);
        owner_ = {};
    }
    free_.notify_all();
    return depth;
}

Unlocked::Unlocked(lua_State* L) : L_(L), depth_(control(L).lock->release_all()) {}

Unlocked::~Unlocked() {
    Control& c = control(L_);
    c.lock->take(depth_);
    c.running = L_;
    if (c.interrupted) arm(L_);
}

Control& session_control(lua_State* L) {
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    lua_State* main = lua_tothread(L, -1);
    lua_pop(L, 1);
    return control(main);
}

void remember_chunk(Control& control, const std::string& name, const std::string& text) {
    constexpr size_t kMost = 500, kLongest = 1 << 20;
    if (text.size() > kLongest) return;
    control.chunks.emplace_front(name, text);
    if (control.chunks.size() > kMost) control.chunks.pop_back();
}

void release_workers(Control& session) {
    for (auto& t : session.threads)
        if (!*t.ended) return void(omp_pause_resource_all(omp_pause_soft));
}

void start_thread(Control& session, std::function<void()> work) {
    for (auto t = session.threads.begin(); t != session.threads.end();) {
        if (*t->ended) t->thread.join(), t = session.threads.erase(t);
        else ++t;
    }
    auto& t = session.threads.emplace_back();
    t.thread = std::thread([work = std::move(work), ended = t.ended]() mutable {
        work();
        work = nullptr;                     // what it holds may be the last of its kind, a run with all its tensors
        *ended = true;
    });
    release_workers(session);
}

void end_background(Control& control) {
    for (auto& weak : std::exchange(control.background, {}))
        if (auto work = weak.lock()) work->end();
    for (auto& t : std::exchange(control.threads, {})) t.thread.join();
    std::lock_guard guard(*control.lock);
    control.job.reset();
    *control.alive = false;
}

void open_coroutines(lua_State* L) {
    lua_getglobal(L, "coroutine");
    set_functions(L, "coroutine.", kCoroutines);
    lua_pop(L, 1);
}

void interrupt(Control& control) noexcept {
    control.interrupted = true;
    if (lua_State* L = control.running) arm(L);
}
}  // namespace moe::lua

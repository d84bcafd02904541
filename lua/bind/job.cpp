#include "lua/bind/job.h"

#include "core/base/log.h"
#include "lua/bind/bind.h"
#include "lua/bind/script.h"

#include <ATen/Parallel.h>

namespace moe::lua {
struct JobValue {
    std::shared_ptr<Job> job;
};
template <>
struct TypeName<JobValue> {
    static constexpr const char* value = "job";
};

namespace {
const char* const kStatus[] = {"running", "paused", "done", "stopped", "failed"};

/// Stack: run, metrics fields as a light userdata, spikes.
int call_back_step(lua_State* L) {
    auto* m = static_cast<const train::StepMetrics*>(lua_touserdata(L, 2));
    bool spikes = lua_toboolean(L, 3);
    lua_settop(L, 1);
    fire_step(L, 1, *m, spikes);
    return 0;
}
constexpr Binding kCallBack = {"callbacks", call_back_step, "callbacks of a step of a job"};
}  // namespace

Job::Job(lua_State* L, int run_index, int64_t num_steps) : value_(check<RunValue>(L, run_index, "run")), threads_(at::get_num_threads()), left_(num_steps) {
    Control& session = session_control(L);
    control_.print = session.print;
    control_.command = session.command;
    control_.script = session.script;
    control_.device = session.device;
    control_.json = session.json;
    control_.lock = session.lock;
    control_.alive = session.alive;
    step_ = value_.run->current_step();
    run_index = lua_absindex(L, run_index);
    co_ = lua_newthread(L);
    lua_pushvalue(L, run_index);
    push_function(L, kCallBack, "job callbacks");
    lua_xmove(L, co_, 2);
    lua_rawsetp(L, LUA_REGISTRYINDEX, this);
    control_slot(co_) = &control_;
}

Job::~Job() {
    std::lock_guard guard(*control_.lock);
    if (!*control_.alive) return;
    lua_pushnil(co_);
    lua_rawsetp(co_, LUA_REGISTRYINDEX, this);
}

void Job::begin(Control& session) {
    start_thread(session, [self = shared_from_this()] { self->work(); });
}

void Job::call_back(const train::StepMetrics& m, bool spikes) {
    if (value_.state->num_callbacks == 0) return;
    std::lock_guard guard(*control_.lock);
    if (!*control_.alive) return;
    control_.running = co_;
    luaL_checkstack(co_, 10, "callbacks");
    int top = lua_gettop(co_);
    lua_pushvalue(co_, 2);
    lua_pushvalue(co_, 1);
    lua_pushlightuserdata(co_, const_cast<train::StepMetrics*>(&m));
    lua_pushboolean(co_, spikes);
    try {
        call_protected(co_, 3, 0);
    } catch (...) {
        lua_settop(co_, top);
        control_.running = nullptr;
        throw;
    }
    control_.running = nullptr;
}

void Job::train() {
    auto& run = value_.run;
    while (left_ > 0) {
        {
            std::unique_lock guard(mutex_);
            changed_.wait(guard, [&] { return !paused_ || stops_; });
            if (stops_ || run->is_stopping()) break;
        }
        train::StepMetrics m;
        {
            run->edge().lock();
            std::unique_lock<train::StepEdge> edge(run->edge(), std::adopt_lock);
            {
                std::lock_guard guard(mutex_);
                if (paused_ || stops_) continue;            // asked for while this waited
                in_step_ = true;
            }
            struct Interrupt {
                train::Run& run;
                ~Interrupt() { run.set_interrupt(nullptr); }
            } interrupt{*run};
            run->set_interrupt(&control_.interrupted);
            m = run->step();
        }
        step_ = m.step;
        --left_;
        bool spikes = is_spike(*value_.state, m.loss, run->config().logging.alarms.spike_sigma);
        {
            std::lock_guard guard(mutex_);
            last_ = m;
            in_step_ = false;
        }
        changed_.notify_all();
        call_back(m, spikes);
    }
}

void Job::work() {
    thread_id_ = std::this_thread::get_id();
    InBackground in(control_);
    at::set_num_threads(threads_);
    std::optional<ErrorParts> error;
    try {
        train();
    } catch (const std::exception&) {
        error = current_exception_parts();
    }
    {
        std::lock_guard guard(mutex_);
        bool given_up = error && error->kind == ErrorKind::interrupted && stops_;
        result_ = given_up ? Status::stopped : error ? Status::failed : left_ > 0 ? Status::stopped : Status::done;
        if (!given_up) error_ = error;
        in_step_ = false;
        ended_ = true;
    }
    changed_.notify_all();
    if (error && result_ == Status::failed) log::warn(fmt::format("job: ended after step {}: {}", step_.load(), Error(*error).what()));
}

void Job::pause() {
    std::lock_guard guard(mutex_);
    paused_ = true;
}

void Job::resume() {
    {
        std::lock_guard guard(mutex_);
        paused_ = false;
    }
    changed_.notify_all();
}

void Job::stop(bool now) {
    {
        std::lock_guard guard(mutex_);
        stops_ = true;
        if (now) control_.interrupted = true;
    }
    changed_.notify_all();
}

void Job::end() {
    stop(false);
    wait([] { return false; });
}

bool Job::wait(const std::function<bool()>& give_up) {
    std::unique_lock guard(mutex_);
    while (!ended_) {
        changed_.wait_for(guard, std::chrono::milliseconds(20));
        if (!ended_ && give_up()) return false;
    }
    return true;
}

Job::Status Job::status() const {
    std::lock_guard guard(mutex_);
    return ended_ ? result_ : paused_ ? Status::paused : Status::running;
}
bool Job::is_training() const {
    std::lock_guard guard(mutex_);
    return !ended_ && (!paused_ || in_step_) && !is_own_thread();
}
std::optional<ErrorParts> Job::error() const {
    std::lock_guard guard(mutex_);
    return error_;
}
std::optional<train::StepMetrics> Job::last() const {
    std::lock_guard guard(mutex_);
    return last_;
}

namespace {
/// Lets a callback that waits for the state go first: a loop that asks for job.step would keep it waiting for ever.
std::shared_ptr<Job> job(lua_State* L) {
    auto j = self<JobValue>(L).job;
    if (!j->is_own_thread()) Unlocked turn(L);
    return j;
}

int pause(lua_State* L) {
    job(L)->pause();
    return lua_settop(L, 1), 1;
}
int resume(lua_State* L) {
    job(L)->resume();
    return lua_settop(L, 1), 1;
}

/// Until it has ended, with the state's lock let go. An interrupt ends the wait; a second one the job.
bool wait_for(lua_State* L, const std::shared_ptr<Job>& j, double secs) {
    MOE_CHECK(!j->is_own_thread(), state, running(L), "a callback of the job itself", "another input", "it would wait for itself: job:stop() ends it after this step");
    auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(secs);
    bool ended;
    {
        Unlocked unlocked(L);
        ended = j->wait([&] { return control(L).interrupted.load() || std::chrono::steady_clock::now() > until; });
    }
    if (!ended && control(L).interrupted && ++j->interrupts > 1) j->stop(true);
    throw_if_interrupted(L);
    return ended;
}

int wait(lua_State* L) {
    auto j = job(L);
    Options o(L, 2, {"timeout"});
    MOE_CHECK(j->status() != Job::Status::paused, state, "job:wait", "a paused job", "one that runs", "job:resume() first");
    bool ended = wait_for(L, j, o.number("timeout", 1e9));
    if (ended && j->error()) throw Error(*j->error());
    lua_settop(L, 1);
    if (auto m = j->last(); ended && m) return push_metrics(L, *m), 1;
    return lua_pushnil(L), 1;
}

int stop(lua_State* L) {
    auto j = job(L);
    Options o(L, 2, {"now"});
    j->stop(o.boolean("now", false));
    if (!j->is_own_thread()) wait_for(L, j, 1e9);
    return lua_settop(L, 1), 1;
}

int status(lua_State* L) { return push_string(L, kStatus[int(job(L)->status())]), 1; }
int field_step(lua_State* L) { return lua_pushinteger(L, job(L)->step()), 1; }
int field_left(lua_State* L) { return lua_pushinteger(L, job(L)->steps_left()), 1; }
int field_error(lua_State* L) {
    auto error = job(L)->error();
    if (!error) return lua_pushnil(L), 1;
    push_error(L, *error);
    return 1;
}
int field_last(lua_State* L) {
    auto m = job(L)->last();
    if (!m) return lua_pushnil(L), 1;
    return push_metrics(L, *m), 1;
}
int text(lua_State* L) {
    auto* box = test_box<JobValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "job (freed)"), 1;
    auto& j = *(*box)->job;
    push_string(L, fmt::format("job: {}, step {}, {} left", kStatus[int(j.status())], j.step(), j.steps_left()));
    return 1;
}

const Binding kMethods[] = {
    {"pause", pause, "job:pause(): no further step; the one at hand ends. Returns job."},
    {"resume", resume, "job:resume(): goes on after job:pause(). Returns job."},
    {"wait", wait, "job:wait {timeout =}: until its last step, or for timeout seconds. Returns the last step's metrics, nil after a timeout; an error that ended the job is raised here. An interrupt ends only the wait, one in a second wait also the job, in the middle of its step, which is undone."},
    {"stop", stop, "job:stop {now = false}: ends it after the step at hand, or now in the middle of it, which is then undone. Returns job."},
    {"status", status, "job:status(): \"running\", \"paused\", \"done\", \"stopped\" or \"failed\"."},
};
const Binding kFields[] = {
    {"step", field_step, "job.step: the last step done; never waits."},
    {"steps_left", field_left, "job.steps_left: steps that it has still to do."},
    {"error", field_error, "job.error: the error that ended it, nil for none."},
    {"last", field_last, "job.last: the last step's metrics, nil before the first."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(job): one line about it."}};
}  // namespace

int start_job(lua_State* L) {
    RunValue value = self<RunValue>(L);
    auto previous = value.state->job.lock();
    using Status = Job::Status;
    MOE_CHECK(!previous || (previous->status() != Status::running && previous->status() != Status::paused), state, "run:start", "a run with a job", "one without", "job:stop() or job:wait() first");
    MOE_CHECK(value.run->model().mesh().world.size() == 1, state, "run:start", fmt::format("{} ranks", value.run->model().mesh().world.size()), "one rank", "ranks agree on inputs only between steps of run:train");
    int64_t n = lua_isnoneornil(L, 2) ? std::max<int64_t>(0, value.run->num_steps() - value.run->current_step()) : check_integer(L, 2, "steps");
    MOE_CHECK(n >= 0, usage, "run:start: steps", std::to_string(n), "0 or more", "");
    auto job = std::make_shared<Job>(L, 1, n);
    value.state->job = job;
    auto& list = session_control(L).background;
    std::erase_if(list, [](auto& w) { return w.expired(); });
    list.push_back(job);
    job->begin(session_control(L));
    push<JobValue>(L, {job});
    return 1;
}

void open_job(lua_State* L) {
    register_type<JobValue>(L, {.name = nullptr, .help = "job: training in the background, from run:start(n).", .methods = kMethods, .fields = kFields, .meta = kMeta});
}
}  // namespace moe::lua

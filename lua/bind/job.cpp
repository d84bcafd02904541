#include "lua/bind/job.h"

#include "core/base/log.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"

#include <ATen/Parallel.h>

#include <cstring>
#include <type_traits>

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
    if (auto& world = value_.run->model().mesh().world; world.size() > 1) control_.ranks = std::make_shared<train::Meeting>(world.duplicate());
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
    if (is_on_ranks()) value_.run->edge().begin_turns();
    start_thread(session, [self = shared_from_this()] { self->work(); });
}

void Job::call_back(const train::StepMetrics& m, bool spikes) {
    bool any = value_.state->num_callbacks > 0;
    if (is_on_ranks()) any = control_.ranks->group().all_reduce(int64_t(any), dist::ReduceOp::max);
    if (!any) return;
    std::lock_guard guard(*control_.lock);
    if (!*control_.alive) return;
    control_.running = co_;
    luaL_checkstack(co_, 10, "callbacks");
    int top = lua_gettop(co_);
    try {
        if (is_on_ranks()) {
            lua_pushvalue(co_, 1);
            settle(co_, 1, fmt::format("the callbacks of step {}", m.step), [&](lua_State* S) { fire_step(S, 1, m, spikes); });
        } else {
            lua_pushvalue(co_, 2);
            lua_pushvalue(co_, 1);
            lua_pushlightuserdata(co_, const_cast<train::StepMetrics*>(&m));
            lua_pushboolean(co_, spikes);
            call_protected(co_, 3, 0);
        }
    } catch (...) {
        lua_settop(co_, top);
        control_.running = nullptr;
        throw;
    }
    control_.running = nullptr;
}

/// The run's step, which a stop may interrupt.
void Job::one_step() {
    auto& run = value_.run;
    struct Interrupt {
        train::Run& run;
        ~Interrupt() { run.set_interrupt(nullptr); }
    } interrupt{*run};
    run->set_interrupt(&control_.interrupted);
    train::StepMetrics m = run->step();
    say_schedule_ended(*run, *value_.state);
    remember_step(*value_.state, m);
    std::lock_guard guard(mutex_);
    last_ = m;
}

/// What follows a step, outside of its edge.
void Job::finish_step(const train::StepMetrics& m) {
    step_ = m.step;
    --left_;
    bool spikes = is_spike(*value_.state, m.loss, value_.run->config().logging.alarms.spike_sigma);
    {
        std::lock_guard guard(mutex_);
        in_step_ = false;
    }
    changed_.notify_all();
    call_back(m, spikes);
}

void Job::train() {
    auto& run = value_.run;
    while (left_ > 0) {
        {
            std::unique_lock guard(mutex_);
            changed_.wait(guard, [&] { return !paused_ || stops_; });
            if (stops_ || run->is_stopping()) break;
        }
        {
            run->edge().lock();
            std::unique_lock<train::StepEdge> edge(run->edge(), std::adopt_lock);
            {
                std::lock_guard guard(mutex_);
                if (paused_ || stops_) continue;            // asked for while this waited
                in_step_ = true;
            }
            one_step();
        }
        finish_step(*last());
    }
}

/// Every rank's thread comes through here alike: what it branches on is agreed upon.
void Job::train_on_ranks() {
    auto& edge = value_.run->edge();
    edge.set_trainer();
    for (;;) {
        int64_t asked_by_all = control_.ranks->group().all_reduce(edge.asked(), dist::ReduceOp::min);
        edge.grant_up_to(asked_by_all);
        bool pauses, ends;
        {
            std::lock_guard guard(mutex_);
            ends = stops_ || value_.run->is_stopping() || left_ <= 0;
            pauses = paused_;
            in_step_ = !ends && !pauses;
        }
        if (ends) break;
        if (pauses) {
            edge.wait_for_more_than(asked_by_all);          // every rank will be asked for the same
            continue;
        }
        one_step();
        finish_step(*last());
    }
}

/// Who waits at a prompt sees by it that the job has ended.
void Job::say_last_step() {
    auto m = last();
    if (!m) return;
    std::unique_lock<train::StepEdge> edge;
    if (!is_on_ranks()) edge = std::unique_lock(value_.run->edge());        // on several ranks nobody else has a turn before end_turns()
    value_.run->say_left_out(*m);
}

void Job::work() {
    thread_id_ = std::this_thread::get_id();
    InBackground in(control_);
    at::set_num_threads(threads_);
    std::optional<ErrorParts> error;
    try {
        is_on_ranks() ? train_on_ranks() : train();
        say_last_step();
    } catch (const std::exception&) {
        error = current_exception_parts();
    }
    {
        std::lock_guard guard(mutex_);
        bool given_up = error && error->kind == ErrorKind::interrupted && stops_;
        result_ = given_up ? Status::stopped : error ? Status::failed : left_ > 0 ? Status::stopped : Status::done;
        if (!given_up) error_ = error;
        in_step_ = false;
    }
    if (is_on_ranks()) value_.run->edge().end_turns();
    {
        std::lock_guard guard(mutex_);
        ended_ = true;                                      // who has waited for it finds an edge without turns
    }
    changed_.notify_all();
    if (error && result_ == Status::failed && (!is_on_ranks() || control_.ranks->rank() == 0 || !train::is_agreed(*error))) log::warn(fmt::format("job: ended after step {}: {}", step_.load(), Error(*error).what()));
}

/// At once, or at the step where all ranks have asked for it.
void Job::request(std::function<void()> f, bool wait) {
    if (!is_on_ranks() || is_own_thread() || waits_for_this_thread()) return f();
    value_.run->edge().ask(std::move(f), wait);
}

void Job::pause() {
    request([this] {
        std::lock_guard guard(mutex_);
        paused_ = true;
    }, true);
}

void Job::resume() {
    request([this] {
        std::lock_guard guard(mutex_);
        paused_ = false;
    }, true);
    changed_.notify_all();
}

void Job::stop(bool now) {
    request([this, now] {
        std::lock_guard guard(mutex_);
        stops_ = true;
        if (now && !is_on_ranks()) control_.interrupted = true;
    }, false);
    changed_.notify_all();
}

void Job::end() {
    const bool trained = is_training();
    stop(false);
    wait([] { return false; });
    if (!trained || is_on_ranks()) return;
    auto& run = *value_.run;
    std::lock_guard edge(run.edge());
    if (run.current_step() > 0) save_left(run, "job: ended");
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
    return result_ != Status::running ? result_ : paused_ ? Status::paused : Status::running;
}
bool Job::is_training() const {
    std::lock_guard guard(mutex_);
    return result_ == Status::running && (!paused_ || in_step_) && !is_own_thread();
}
Job::Status Job::common_status(lua_State* L) {
    if (!is_on_ranks() || is_own_thread() || !ranks_of(L)) return status();
    auto there = Status(std::stoi(from_rank_0(L, running(L), [&] { return std::to_string(int(status())); })));
    if (there == Status::running || there == Status::paused) return there;
    {
        Unlocked unlocked(L);
        wait([] { return false; });
    }
    forget_turns(L);
    return there;
}
/// A later job of the run has turns of its own.
void Job::forget_turns(lua_State* L) {
    if (value_.state->job.lock().get() == this) value_.run->edge().forget_turns();
    if (session_control(L).job.get() == this) session_control(L).job.reset();
}
bool Job::is_training_anywhere(lua_State* L) {
    if (!is_on_ranks() || is_own_thread() || !ranks_of(L)) return is_training();
    if (!value_.run->edge().has_turns()) return false;      // as all know; some may have let go of it
    bool there = !from_rank_0(L, running(L), [&] { return std::string(is_training() ? "yes" : ""); }).empty();
    Unlocked unlocked(L);
    while (!there && is_training()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return there;
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

/// What changes a job: on several ranks all must come.
std::shared_ptr<Job> job_of_all(lua_State* L) {
    auto j = job(L);
    if (j->is_on_ranks()) meet(L);
    return j;
}

int pause(lua_State* L) {
    auto j = job_of_all(L);
    if (!j->is_on_ranks()) j->pause();
    else {
        Unlocked unlocked(L);
        j->pause();
    }
    return lua_settop(L, 1), 1;
}
int resume(lua_State* L) {
    auto j = job_of_all(L);
    if (!j->is_on_ranks()) j->resume();
    else {
        Unlocked unlocked(L);
        j->resume();
    }
    return lua_settop(L, 1), 1;
}

/// Until it has ended, with the state's lock let go. An interrupt ends the wait; a second one the job.
bool wait_for(lua_State* L, const std::shared_ptr<Job>& j, double secs) {
    MOE_CHECK(!j->is_own_thread(), state, running(L), "a callback of the job itself", "another input", "it would wait for itself: job:stop() ends it after this step");
    bool has_ended = !j->is_on_ranks() && j->status() != Job::Status::running;
    MOE_CHECK(has_ended || !j->waits_for_this_thread(), state, running(L), j->is_on_ranks() ? "a call of all ranks, for which the job waits" : "a callback, for whose end the job waits", "another place", "wait for it after the call");
    auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(secs);
    bool ended = false;
    auto wait_here = [&] {
        Unlocked unlocked(L);
        ended = j->wait([&] { return control(L).interrupted.load() || std::chrono::steady_clock::now() > until; });
    };
    if (!j->is_on_ranks()) wait_here();
    else {
        // Rank 0 waits, and says how that ended.
        std::string outcome = from_rank_0(L, running(L), [&] {
            wait_here();
            return std::string(ended ? "ended" : control(L).interrupted ? "interrupted" : "");
        });
        ended = outcome == "ended";
        if (outcome == "interrupted") {
            if (++j->interrupts > 1) j->stop(true);
            throw_interrupted_on_all(L);
        }
        if (!ended) return false;
        {
            Unlocked unlocked(L);
            j->wait([] { return false; });
        }
        j->forget_turns(L);
        return true;
    }
    if (!ended && control(L).interrupted && ++j->interrupts > 1) j->stop(true);
    throw_if_interrupted(L);
    return ended;
}

int wait(lua_State* L) {
    auto j = job(L);
    Options o(L, 2, {"timeout"});
    MOE_CHECK(j->common_status(L) != Job::Status::paused, state, "job:wait", "a paused job", "one that runs", "job:resume() first");
    bool had_ended = j->status() != Job::Status::running, ended = wait_for(L, j, o.number("timeout", 1e9));
    if (ended && j->error()) throw Error(*j->error());
    lua_settop(L, 1);
    if (auto m = j->last(); ended && m) {
        if (!had_ended && j->prints_lines()) control(L).last_log = m->line();          // which stands there already
        return push_metrics(L, *m), 1;
    }
    return lua_pushnil(L), 1;
}

int stop(lua_State* L) {
    auto j = job_of_all(L);
    Options o(L, 2, {"now"});
    j->stop(o.boolean("now", false));
    bool may_wait = !j->is_own_thread() && !(j->is_on_ranks() && j->waits_for_this_thread());
    if (may_wait) wait_for(L, j, 1e9);
    return lua_settop(L, 1), 1;
}

int status(lua_State* L) { return push_string(L, kStatus[int(job(L)->common_status(L))]), 1; }
/// While it trains, ranks are a step apart at times: all say what rank 0 says.
int push_count(lua_State* L, int64_t (Job::*count)() const) {
    auto j = job(L);
    auto text = [&] { return std::to_string((*j.*count)()); };
    lua_pushinteger(L, std::stoll(j->is_on_ranks() && !j->is_own_thread() ? from_rank_0(L, running(L), text) : text()));
    return 1;
}
int field_step(lua_State* L) { return push_count(L, &Job::step); }
int field_left(lua_State* L) { return push_count(L, &Job::steps_left); }
int field_error(lua_State* L) {
    auto j = job(L);
    j->common_status(L);                                  // what rank 0 knows has come here, too
    auto error = j->error();
    if (!error) return lua_pushnil(L), 1;
    push_error(L, *error);
    return 1;
}
int field_last(lua_State* L) {
    auto j = job(L);
    auto bytes = [&] {
        auto m = j->last();
        return m ? std::string(reinterpret_cast<const char*>(&*m), sizeof *m) : std::string();
    };
    static_assert(std::is_trivially_copyable_v<train::StepMetrics>);
    std::string last = j->is_on_ranks() && !j->is_own_thread() ? from_rank_0(L, running(L), bytes) : bytes();
    if (last.empty()) return lua_pushnil(L), 1;
    train::StepMetrics m;
    std::memcpy(&m, last.data(), sizeof m);
    push_metrics(L, m);
    return 1;
}
int text(lua_State* L) {
    auto* box = test_box<JobValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "job (freed)"), 1;
    auto& j = *(*box)->job;
    push_string(L, fmt::format("job: {}, step {}, {} left", kStatus[int(j.status())], j.step(), j.steps_left()));
    return 1;
}

const Binding kMethods[] = {
    {"pause", pause, "job:pause(): no further step; the one at hand ends (on several ranks this waits for it). Returns job."},
    {"resume", resume, "job:resume(): goes on after job:pause(). Returns job."},
    {"wait", wait, "job:wait {timeout =}: until its last step, or for timeout seconds. Returns the last step's metrics, nil after a timeout; an error that ended the job is raised here. An interrupt ends only the wait, one in a second wait also the job, in the middle of its step, which is undone (on several ranks after its step)."},
    {"stop", stop, "job:stop {now = false}: ends it after the step at hand, or now in the middle of it, which is then undone. On several ranks the step at hand is ended in both cases. Returns job."},
    {"status", status, "job:status(): \"running\", \"paused\", \"done\", \"stopped\" or \"failed\". On several ranks all ask together, and get what rank 0 sees."},
};
const Binding kFields[] = {
    {"step", field_step, "job.step: the last step done; never waits for a step to end. On several ranks all ask together, and get rank 0's."},
    {"steps_left", field_left, "job.steps_left: steps that it has still to do."},
    {"error", field_error, "job.error: the error that ended it, nil for none."},
    {"last", field_last, "job.last: the last step's metrics, nil before the first."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(job): one line about it."}};
}  // namespace

LiveRun turn_beside_job(lua_State* L) {
    std::shared_ptr<Job> job = session_control(L).job;
    if (!job || !job->run()->edge().has_turns() || job->run()->edge().is_trainer()) return {};
    auto run = job->run();
    Unlocked unlocked(L);
    run->edge().lock();
    return {run, HeldEdge(run->edge(), std::adopt_lock)};
}

namespace {
/// On several ranks a session has one job: the callbacks of two would wait for each other's collectives under the state's locks.
void check_no_other_job(lua_State* L, const RunValue& value) {
    Control& session = session_control(L);
    auto previous = ranks_of(L) ? session.job : value.state->job.lock();
    if (!previous) return;
    bool same_run = previous->run() == value.run;
    auto status = previous->common_status(L);
    MOE_CHECK(status != Job::Status::running && status != Job::Status::paused, state, "run:start", same_run ? "a run with a job" : "another run's job", same_run ? "one without" : "one job at a time on several ranks",
              "job:stop() or job:wait() first");
}
}  // namespace

int start_job(lua_State* L) {
    RunValue value = self<RunValue>(L);
    check_no_other_job(L, value);
    MOE_CHECK(!ranks_of(L) || control(L).calls <= 1, state, "run:start", "a callback of another run", "a place between calls of all ranks", "on several ranks such a job would begin inside of that run's call");
    int64_t n = lua_isnoneornil(L, 2) ? std::max<int64_t>(0, value.run->num_steps() - value.run->current_step()) : check_integer(L, 2, "steps");
    MOE_CHECK(n >= 0, usage, "run:start: steps", std::to_string(n), "0 or more", "");
    auto job = std::make_shared<Job>(L, 1, n);
    value.state->job = job;
    if (ranks_of(L)) session_control(L).job = job;
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

#include "core/train/profile.h"

#include "core/base/error.h"
#include "core/train/hardware.h"

#include <ATen/core/TensorBody.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#ifdef MOE_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <set>
#include <unordered_map>

namespace moe::train {
namespace {
namespace kineto = torch::autograd::profiler;
using Activity = torch::profiler::impl::ActivityType;
/// What KinetoEvent::activityType() says; the numbers of libkineto::ActivityType, whose header the wheel lacks.
enum Kind : uint8_t { kOperator = 0, kAnnotation = 1, kCopy = 3, kFill = 4, kKernel = 5, kRuntime = 7, kDriver = 8 };

void wait_for_gpu() {
#ifdef MOE_WITH_CUDA
    if (c10::cuda::device_count() > 0) c10::cuda::device_synchronize();
#endif
}

struct Span { uint64_t start, end; std::string name; };

class Sums {
public:
    void add(const std::string& name, double secs, int64_t count = 1) {
        auto& row = rows_[name];
        row.secs += secs;
        row.count += count;
    }
    std::vector<ProfileRow> rows() const {
        std::vector<ProfileRow> list;
        for (auto& [name, row] : rows_) list.push_back({name, row.count, row.secs});
        std::stable_sort(list.begin(), list.end(), [](auto& a, auto& b) { return a.secs > b.secs; });
        return list;
    }

private:
    std::map<std::string, ProfileRow> rows_;
};

/// Operators by their own time: what they call lies within them, on the same thread.
void add_own_times(std::vector<Span> spans, Sums& sums) {
    std::stable_sort(spans.begin(), spans.end(), [](auto& a, auto& b) { return a.start != b.start ? a.start < b.start : a.end > b.end; });
    std::vector<const Span*> open;
    for (auto& s : spans) {
        while (!open.empty() && open.back()->end <= s.start) open.pop_back();
        double secs = double(s.end - s.start) * 1e-9;
        sums.add(s.name, secs);
        if (!open.empty()) sums.add(open.back()->name, -secs, 0);
        open.push_back(&s);
    }
}

/// The innermost phase around a time on the host; phases follow one another on one thread.
const Span* phase_at(const std::vector<Span>& phases, uint64_t time) {
    auto after = std::upper_bound(phases.begin(), phases.end(), time, [](uint64_t t, auto& s) { return t < s.start; });
    while (after != phases.begin())
        if ((--after)->end >= time) return &*after;
    return nullptr;
}

Profile summary(const std::vector<kineto::KinetoEvent>& events) {
    std::vector<Span> phases;
    std::map<uint64_t, std::vector<Span>> operators;               // by thread
    std::unordered_map<uint64_t, uint64_t> launched;               // correlation → time of the launch
    bool on_gpu = false;
    Sums kernels, by_phase, calls;
    for (auto& e : events) {
        Span span{e.startNs(), e.endNs(), e.name()};
        uint8_t kind = e.activityType();
        if (e.deviceType() != c10::DeviceType::CPU) on_gpu = on_gpu || kind == kKernel;
        else if (kind == kAnnotation) phases.push_back(span);
        else if (kind == kOperator) operators[e.startThreadId()].push_back(span);
        else if (kind == kRuntime || kind == kDriver) {
            launched[e.correlationId()] = e.startNs();
            calls.add(e.name(), double(e.durationNs()) * 1e-9);
        }
    }
    std::stable_sort(phases.begin(), phases.end(), [](auto& a, auto& b) { return a.start < b.start; });
    Profile out;
    if (!on_gpu) {
        for (auto& [thread, spans] : operators) add_own_times(spans, kernels);
        for (auto& s : phases) by_phase.add(s.name, double(s.end - s.start) * 1e-9);
    }
    for (auto& e : events) {
        uint8_t kind = e.activityType();
        if (!on_gpu || e.deviceType() == c10::DeviceType::CPU || (kind != kKernel && kind != kCopy && kind != kFill)) continue;
        double secs = double(e.durationNs()) * 1e-9;
        out.busy_secs += secs;
        kernels.add(e.name(), secs);
        auto launch = launched.find(e.correlationId());
        const Span* phase = launch == launched.end() ? nullptr : phase_at(phases, launch->second);
        by_phase.add(phase ? phase->name : "other", secs);
    }
    out.kernels = kernels.rows();
    out.phases = by_phase.rows();
    out.calls = calls.rows();
    return out;
}
}  // namespace

Profile profile(const std::function<void()>& work) {
    setenv("KINETO_LOG_LEVEL", "99", /*overwrite=*/0);             // else it says on standard error that there is no GPU
    std::set<Activity> what = {Activity::CPU};
    if (!gpus().empty()) what.insert(Activity::CUDA);
    torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
    MOE_CHECK(!kineto::isProfilerEnabledInMainThread(), state, "profile", "a profile that is being recorded", "one at a time", "");
    wait_for_gpu();
    kineto::prepareProfiler(config, what);
    kineto::enableProfiler(config, what, {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION, at::RecordScope::USER_SCOPE});
    auto recorded = [] {
        try {
            return kineto::disableProfiler();
        } catch (const c10::Error& e) {               // its own checks of what the driver has told it
            std::string said = e.what_without_backtrace();
            MOE_THROW(state, "profile", said.substr(0, said.find('\n')), "a recording that LibTorch's profiler can read", "record again");
        }
    };
    auto start = std::chrono::steady_clock::now();
    try {
        work();
        wait_for_gpu();
    } catch (...) {
        try {
            kineto::disableProfiler();
        } catch (const c10::Error&) {                 // what went wrong first is said
        }
        throw;
    }
    double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    auto result = recorded();
    Profile out = summary(result->events());
    out.wall_secs = wall;
    return out;
}
}  // namespace moe::train

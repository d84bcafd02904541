#include "core/base/stop.h"

#include <atomic>

namespace moe {
namespace {
std::atomic<bool> stop_wanted = false;
std::atomic<int> num_stop_listeners = 0;
static_assert(std::atomic<bool>::is_always_lock_free, "signal handlers may not wait");
}  // namespace

void request_stop() noexcept { stop_wanted = true; }
bool stop_requested() noexcept { return stop_wanted; }
void clear_stop() noexcept { stop_wanted = false; }

StopListener::StopListener() noexcept { ++num_stop_listeners; }
StopListener::~StopListener() { --num_stop_listeners; }
bool StopListener::any() noexcept { return num_stop_listeners > 0; }

}  // namespace moe

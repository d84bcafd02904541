// A wish from outside, such as a signal, that what runs for long should save and end soon.
#pragma once

namespace moe {

/// Training ends at the edge of its current step. May be called from a signal handler.
void request_stop() noexcept;
/// Since the last clear_stop(), or the start.
bool stop_requested() noexcept;
void clear_stop() noexcept;

/// Alive while somebody asks stop_requested() regularly; without any the caller of request_stop() must end the work itself.
class StopListener {
public:
    StopListener() noexcept;
    ~StopListener();
    StopListener(const StopListener&) = delete;
    StopListener& operator=(const StopListener&) = delete;
    static bool any() noexcept;
};

}  // namespace moe

// How often rows were read to be quantised.
#pragma once
#include <ATen/record_function.h>

#include <atomic>
#include <cstring>
#include <memory>

namespace moe::test {
/// Counts calls of kernels::quantize_rows on all threads from its making on.
class Quantizations {
public:
    Quantizations() {
        calls() = 0;
        handle_ = at::addGlobalCallback(at::RecordFunctionCallback([](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
            if (!std::strcmp(f.name(), "moe::quantize_rows")) ++calls();
            return nullptr;
        }).scopes({at::RecordScope::FUNCTION}));
    }
    ~Quantizations() { at::removeCallback(handle_); }
    Quantizations(const Quantizations&) = delete;
    int count() const { return calls(); }

private:
    static std::atomic<int>& calls() {
        static std::atomic<int> n;
        return n;
    }
    at::CallbackHandle handle_;
};
}  // namespace moe::test

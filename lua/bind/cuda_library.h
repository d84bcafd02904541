// NVIDIA's run-time compiler and driver, opened when first used: nothing here links with them.
#pragma once
#include <c10/core/Device.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace moe::lua {

/// What NVRTC made of a source.
struct CompiledSource {
    std::string cubin, log;
    std::vector<std::string> lowered;      ///< names in the cubin, of `names` in order
};
struct CompileOptions {
    std::string name = "kernel.cu";
    std::vector<std::string> options;
    std::vector<std::pair<std::string, std::string>> headers;       ///< name, text
    std::string arch;                                               ///< "sm_90"; empty: that of the GPU here, sm_90 without one
};
/// Raised as it is by a source with errors: the compiler's output.
struct CompileFailed {
    std::string log;
};
/// Compiles for one architecture. Throws moe::Error (device) where the compiler's library is not there, CompileFailed for a source with errors.
CompiledSource compile_cuda(const std::string& source, const std::vector<std::string>& names, const CompileOptions& options);

/// True where the driver is there and has a device, and LibTorch was built for it.
bool has_cuda_device();
/// Throws moe::Error (device) unless has_cuda_device().
void require_cuda_device(const std::string& op);

/// A compiled source on the devices where it was used. Threads take turns.
class CudaModule {
public:
    explicit CudaModule(std::string cubin) : cubin_(std::move(cubin)) {}
    ~CudaModule();
    /// Launches a kernel on a stream of the current device. Throws moe::Error (cuda).
    void launch(const std::string& lowered, c10::Device device, std::array<unsigned, 3> grid, std::array<unsigned, 3> block, unsigned shared_bytes, void* stream, void** arguments);
    /// Registers and shared and local bytes a thread or block; threads a block at most.
    std::map<std::string, int> attributes(const std::string& lowered, c10::Device device);

private:
    void* function(const std::string& lowered, c10::Device device);
    std::string cubin_;
    std::map<int, void*> modules_;
};

}  // namespace moe::lua

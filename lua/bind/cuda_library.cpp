#include "lua/bind/cuda_library.h"

#include "core/base/error.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <dlfcn.h>

#include <filesystem>
#include <mutex>

namespace moe::lua {
namespace {
namespace fs = std::filesystem;

// The few declarations of nvrtc.h and cuda.h that are used, which the libraries keep from release to release.
using NvrtcProgram = void*;
struct Nvrtc {
    int (*create)(NvrtcProgram*, const char*, const char*, int, const char* const*, const char* const*);
    int (*destroy)(NvrtcProgram*);
    int (*compile)(NvrtcProgram, int, const char* const*);
    int (*add_name)(NvrtcProgram, const char*);
    int (*lowered_name)(NvrtcProgram, const char*, const char**);
    int (*cubin_size)(NvrtcProgram, size_t*);
    int (*cubin)(NvrtcProgram, char*);
    int (*log_size)(NvrtcProgram, size_t*);
    int (*log)(NvrtcProgram, char*);
    const char* (*error_text)(int);
    std::string include;                    ///< folder of CUDA's headers, "" where none was found
};
struct Driver {
    int (*init)(unsigned);
    int (*device_count)(int*);
    int (*device_attribute)(int*, int, int);
    int (*load)(void**, const void*);
    int (*unload)(void*);
    int (*get_function)(void**, void*, const char*);
    int (*function_attribute)(int*, int, void*);
    int (*set_function_attribute)(void*, int, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*error_name)(int, const char**);
    int (*error_text)(int, const char**);
};
constexpr int kMajor = 75, kMinor = 76;                                     // CUdevice_attribute
constexpr int kMaxThreads = 0, kShared = 1, kLocal = 3, kRegisters = 4, kMaxDynamicShared = 8;     // CUfunction_attribute

template <class F>
bool find(void* library, const char* name, F& f) {
    f = reinterpret_cast<F>(dlsym(library, name));
    return f;
}

/// Folders beside LibTorch where its wheel's CUDA libraries lie.
std::vector<fs::path> wheel_folders() {
    Dl_info info;
    std::vector<fs::path> out;
    if (!dladdr(reinterpret_cast<const void*>(&at::globalContext), &info) || !info.dli_fname) return out;
    std::error_code failed;
    fs::path nvidia = fs::weakly_canonical(info.dli_fname, failed).parent_path().parent_path().parent_path() / "nvidia";
    for (auto& folder : fs::directory_iterator(nvidia, failed)) {
        if (fs::is_directory(folder.path() / "lib", failed)) out.push_back(folder.path() / "lib");
    }
    return out;
}
void* open_library(std::initializer_list<const char*> names) {
    for (const char* name : names) {
        if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    }
    for (auto& folder : wheel_folders()) {
        for (const char* name : names) {
            if (void* library = dlopen((folder / name).c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
        }
    }
    return nullptr;
}

const Nvrtc& nvrtc() {
    static const Nvrtc* const api = []() -> const Nvrtc* {
        void* lib = open_library({"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"});
        auto* n = new Nvrtc{};
        bool whole = lib && find(lib, "nvrtcCreateProgram", n->create) && find(lib, "nvrtcDestroyProgram", n->destroy) && find(lib, "nvrtcCompileProgram", n->compile) &&
                     find(lib, "nvrtcAddNameExpression", n->add_name) && find(lib, "nvrtcGetLoweredName", n->lowered_name) && find(lib, "nvrtcGetCUBINSize", n->cubin_size) &&
                     find(lib, "nvrtcGetCUBIN", n->cubin) && find(lib, "nvrtcGetProgramLogSize", n->log_size) && find(lib, "nvrtcGetProgramLog", n->log) &&
                     find(lib, "nvrtcGetErrorString", n->error_text);
        if (!whole) return nullptr;
        Dl_info info;
        std::error_code failed;
        std::vector<fs::path> roots;
        if (dladdr(reinterpret_cast<const void*>(n->create), &info) && info.dli_fname) roots.push_back(fs::weakly_canonical(info.dli_fname, failed).parent_path().parent_path());
        if (const char* home = std::getenv("CUDA_HOME")) roots.emplace_back(home);
        roots.emplace_back("/usr/local/cuda");
        for (auto& root : roots) {
            if (n->include.empty() && fs::exists(root / "include" / "cuda_fp16.h", failed)) n->include = (root / "include").string();
        }
        return n;
    }();
    MOE_CHECK(api, device, "moe.cuda.compile", "no libnvrtc.so", "NVIDIA's run-time compiler, which comes with CUDA and with PyTorch's CUDA wheels", "");
    return *api;
}
const Driver* driver() {
    static const Driver* const api = []() -> const Driver* {
        void* lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        auto* d = new Driver{};
        bool whole = lib && find(lib, "cuInit", d->init) && find(lib, "cuDeviceGetCount", d->device_count) && find(lib, "cuDeviceGetAttribute", d->device_attribute) &&
                     find(lib, "cuModuleLoadData", d->load) && find(lib, "cuModuleUnload", d->unload) && find(lib, "cuModuleGetFunction", d->get_function) &&
                     find(lib, "cuFuncGetAttribute", d->function_attribute) && find(lib, "cuFuncSetAttribute", d->set_function_attribute) && find(lib, "cuLaunchKernel", d->launch) &&
                     find(lib, "cuGetErrorName", d->error_name) && find(lib, "cuGetErrorString", d->error_text);
        int count = 0;
        return whole && d->init(0) == 0 && d->device_count(&count) == 0 && count > 0 ? d : nullptr;
    }();
    return api;
}

void check_driver(int result, const char* what) {
    if (result == 0) return;
    const char *name = nullptr, *text = nullptr;
    driver()->error_name(result, &name);
    driver()->error_text(result, &text);
    MOE_THROW(cuda, what, fmt::format("{} ({})", name ? name : std::to_string(result), text ? text : "no text"), "no error", "an earlier kernel may have failed: moe.cuda.synchronize() after each tells which");
}
void check_nvrtc(int result, const char* what) { MOE_CHECK(result == 0, cuda, std::string("moe.cuda.compile: ") + what, nvrtc().error_text(result), "no error", ""); }

std::string own_arch() {
    if (!has_cuda_device()) return "sm_90";
    int major = 0, minor = 0;
    check_driver(driver()->device_attribute(&major, kMajor, 0), "cuDeviceGetAttribute");
    check_driver(driver()->device_attribute(&minor, kMinor, 0), "cuDeviceGetAttribute");
    return fmt::format("sm_{}{}", major, minor);
}
std::mutex modules_mutex;
}  // namespace

bool has_cuda_device() { return at::hasCUDA() && driver(); }
void require_cuda_device(const std::string& op) {
    MOE_CHECK(has_cuda_device(), device, op, at::hasCUDA() ? "no GPU's driver" : "no CUDA device, or a build without CUDA", "an NVIDIA GPU", "compiling works without one");
}

CompiledSource compile_cuda(const std::string& source, const std::vector<std::string>& names, const CompileOptions& o) {
    const Nvrtc& n = nvrtc();
    struct Program {
        NvrtcProgram handle = nullptr;
        ~Program() {
            if (handle) nvrtc().destroy(&handle);
        }
    } program;
    std::vector<const char*> header_names, header_texts, options;
    for (auto& [name, text] : o.headers) header_names.push_back(name.c_str()), header_texts.push_back(text.c_str());
    check_nvrtc(n.create(&program.handle, source.c_str(), o.name.c_str(), int(o.headers.size()), header_texts.data(), header_names.data()), "nvrtcCreateProgram");
    for (auto& name : names) check_nvrtc(n.add_name(program.handle, name.c_str()), "nvrtcAddNameExpression");
    std::string arch = "--gpu-architecture=" + (o.arch.empty() ? own_arch() : o.arch), include = "--include-path=" + n.include;
    options.push_back(arch.c_str());
    if (!n.include.empty()) options.push_back(include.c_str());
    for (auto& option : o.options) options.push_back(option.c_str());
    int result = n.compile(program.handle, int(options.size()), options.data());
    CompiledSource out;
    size_t size = 0;
    check_nvrtc(n.log_size(program.handle, &size), "nvrtcGetProgramLogSize");
    out.log.resize(size);
    check_nvrtc(n.log(program.handle, out.log.data()), "nvrtcGetProgramLog");
    while (!out.log.empty() && (out.log.back() == '\0' || out.log.back() == '\n')) out.log.pop_back();
    if (result != 0 && out.log.empty()) check_nvrtc(result, "nvrtcCompileProgram");
    if (result != 0) throw CompileFailed{out.log};
    for (auto& name : names) {
        const char* lowered = nullptr;
        check_nvrtc(n.lowered_name(program.handle, name.c_str(), &lowered), "nvrtcGetLoweredName");
        out.lowered.emplace_back(lowered);
    }
    check_nvrtc(n.cubin_size(program.handle, &size), "nvrtcGetCUBINSize");
    out.cubin.resize(size);
    check_nvrtc(n.cubin(program.handle, out.cubin.data()), "nvrtcGetCUBIN");
    return out;
}

CudaModule::~CudaModule() {
    for (auto& [device, module] : modules_) driver()->unload(module);       // an error here is a context that is gone, and the module with it
}

void* CudaModule::function(const std::string& lowered, c10::Device device) {
    std::lock_guard lock(modules_mutex);
    void*& module = modules_[device.index()];
    if (!module) {
        void* loaded = nullptr;
        check_driver(driver()->load(&loaded, cubin_.data()), "cuModuleLoadData");
        module = loaded;
    }
    void* f = nullptr;
    check_driver(driver()->get_function(&f, module, lowered.c_str()), "cuModuleGetFunction");
    return f;
}

void CudaModule::launch(const std::string& lowered, c10::Device device, std::array<unsigned, 3> grid, std::array<unsigned, 3> block, unsigned shared_bytes, void* stream, void** arguments) {
    void* f = function(lowered, device);
    int most = 0;
    check_driver(driver()->function_attribute(&most, kMaxThreads, f), "cuFuncGetAttribute");
    uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    MOE_CHECK(threads <= uint64_t(most), usage, "launch of " + lowered + ": block", fmt::format("{} threads", threads), fmt::format("at most {}", most), "");
    constexpr unsigned kUnasked = 48 << 10;       // more dynamic shared memory has to be asked for
    if (shared_bytes > kUnasked) check_driver(driver()->set_function_attribute(f, kMaxDynamicShared, int(shared_bytes)), "shared bytes of a launch");
    check_driver(driver()->launch(f, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared_bytes, stream, arguments, nullptr), "cuLaunchKernel");
}

std::map<std::string, int> CudaModule::attributes(const std::string& lowered, c10::Device device) {
    void* f = function(lowered, device);
    std::map<std::string, int> out;
    for (auto [name, attribute] : {std::pair("registers", kRegisters), std::pair("shared_bytes", kShared), std::pair("local_bytes", kLocal), std::pair("max_threads", kMaxThreads)}) {
        check_driver(driver()->function_attribute(&out[name], attribute, f), "cuFuncGetAttribute");
    }
    return out;
}
}  // namespace moe::lua

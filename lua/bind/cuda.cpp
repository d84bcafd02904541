// moe.cuda: kernels compiled from a script, their launch with checked arguments, and times.
#include "core/base/json.h"
#include "core/tensor/check.h"
#include "lua/bind/bind.h"
#include "lua/bind/cuda_library.h"
#include "lua/bind/cuda_signature.h"
#include "lua/bind/cuda_stream.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace moe::lua {

struct Kernel {
    std::shared_ptr<CudaModule> module;
    KernelSignature signature;
    std::string lowered, log;
};
template <>
struct TypeName<Kernel> {
    static constexpr const char* value = "cuda kernel";
};

namespace {
using at::Tensor;
using Guard = c10::impl::VirtualGuardImpl;

// --- compiling ---

struct Place {
    std::string file;
    int64_t line;       ///< of the source's first line
};
/// Where in the script the text stands: the occurrence nearest to the line that calls. Texts with escapes, and code that is in no file, count from the call on.
Place place_of(lua_State* L, const std::string& source) {
    lua_Debug frame;
    for (int level = 1; lua_getstack(L, level, &frame); ++level) {
        lua_getinfo(L, "Sl", &frame);
        if (frame.currentline <= 0) continue;
        Place place{frame.short_src, frame.currentline};
        if (frame.source[0] != '@') return place;
        std::string script;
        try {
            script = read_text(frame.source + 1);
        } catch (const Error&) {
            return place;
        }
        int64_t best = -1;
        for (size_t at = source.empty() ? std::string::npos : script.find(source); at != std::string::npos; at = script.find(source, at + 1)) {
            int64_t line = 1 + std::count(script.begin(), script.begin() + long(at), '\n');
            if (best < 0 || std::abs(line - frame.currentline) < std::abs(best - frame.currentline)) best = line;
        }
        if (best > 0) place.line = best;
        return place;
    }
    return {"kernel.cu", 1};
}

/// Raises Lua's error object for the compiler's output: its first error as the message, at that line of the script.
int raise_compile_error(lua_State* L, const std::string& log) {
    // "script.lua(12): error: identifier "y" is undefined"
    size_t at = log.find("): error"), start = at == std::string::npos ? at : log.rfind('\n', at);
    start = start == std::string::npos ? 0 : start + 1;
    std::string where, message = log.substr(0, log.find('\n'));
    if (at != std::string::npos) {
        size_t open = log.rfind('(', at), colon = log.find(": ", at + 3);
        where = log.substr(start, open - start) + ":" + log.substr(open + 1, at - open - 1);
        message = log.substr(colon + 2, log.find('\n', colon) - colon - 2);
    }
    push_error(L, {ErrorKind::cuda, "moe.cuda.compile: " + (where.empty() ? "" : where + ": ") + message, "", "", "", where, -1, ""});
    push_string(L, where);
    lua_setfield(L, -2, "where");
    push_string(L, log);
    lua_setfield(L, -2, "log");
    return lua_error(L);
}

std::vector<std::string> texts(lua_State* L, const Options& o, const char* name) {
    std::vector<std::string> list;
    o.push(name);
    if (!lua_isnil(L, -1)) {
        int index = lua_gettop(L);
        check_table(L, index, name);
        for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
            lua_rawgeti(L, index, i);
            list.push_back(check_string(L, -1, name));
            lua_pop(L, 1);
        }
    }
    lua_pop(L, 1);
    return list;
}

int compile(lua_State* L) {
    std::string source = check_string(L, 1, "source");
    Options o(L, 2, {"name", "options", "headers", "include", "arch"});
    CompileOptions options;
    options.arch = o.string("arch", "");
    options.options = texts(L, o, "options");
    for (auto& folder : texts(L, o, "include")) options.options.push_back("--include-path=" + folder);
    o.push("headers");
    if (!lua_isnil(L, -1)) {
        int index = lua_gettop(L);
        check_table(L, index, "headers");
        for (auto& name : ordered_keys(L, index)) {
            lua_getfield(L, index, name.c_str());
            options.headers.emplace_back(name, check_string(L, -1, "text of a header"));
            lua_pop(L, 1);
        }
    }
    Place place = place_of(L, source);
    options.name = place.file;
    std::string wanted = o.string("name", "");
    std::vector<KernelSignature> kernels = kernel_signatures(source);
    std::vector<std::string> names;
    for (auto& k : kernels) names.push_back(k.name);
    MOE_CHECK(!kernels.empty(), usage, "moe.cuda.compile", "a source without a kernel", "extern \"C\" __global__ void name(…) { … }", "");
    if (!wanted.empty() && std::find(names.begin(), names.end(), wanted) == names.end()) {
        std::string list;
        for (auto& n : names) list += (list.empty() ? "" : ", ") + n;
        MOE_THROW(usage, "moe.cuda.compile: name", '"' + wanted + '"', "one of " + list, "");
    }
    std::string file = place.file;
    std::replace(file.begin(), file.end(), '"', '\'');
    std::replace(file.begin(), file.end(), '\\', '/');
    CompiledSource compiled = compile_cuda(fmt::format("#line {} \"{}\"\n", place.line, file) + source, names, options);
    if (compiled.failed) return raise_compile_error(L, compiled.log);
    auto module = std::make_shared<CudaModule>(std::move(compiled.cubin));
    if (wanted.empty() && kernels.size() > 1) push_ordered_table(L, names);
    for (size_t i = 0; i < kernels.size(); ++i) {
        if (!wanted.empty() && names[i] != wanted) continue;
        push(L, Kernel{module, kernels[i], compiled.lowered[i], compiled.log});
        if (!wanted.empty() || kernels.size() == 1) return 1;
        lua_setfield(L, -2, names[i].c_str());
    }
    return 1;
}

// --- arguments ---

/// Values as a launch wants them: a pointer to each.
struct Arguments {
    std::vector<uint64_t> values;
    std::vector<void*> pointers;
    std::vector<Tensor> tensors;        ///< in the order of the parameters, undefined for numbers
    at::Device device = at::kCPU;
};

std::string what(const Kernel& k, size_t i) {
    auto& p = k.signature.parameters[i];
    return k.signature.name + ": argument " + std::to_string(i + 1) + (p.name.empty() ? "" : ", " + p.name);
}

uint64_t number_argument(lua_State* L, int index, const Kernel& k, size_t i) {
    auto& p = k.signature.parameters[i];
    uint64_t bits = 0;
    if (p.dtype == at::kBool) {
        if (!lua_isboolean(L, index)) MOE_THROW(usage, what(k, i), got_text(L, index), "true or false", p.type);
        return lua_toboolean(L, index);
    }
    if (lua_type(L, index) != LUA_TNUMBER) MOE_THROW(usage, what(k, i), got_text(L, index), "a number", p.type);
    if (p.dtype == at::kFloat || p.dtype == at::kDouble) {
        double value = lua_tonumber(L, index);
        float narrow = float(value);
        if (p.dtype == at::kFloat) std::memcpy(&bits, &narrow, sizeof narrow);
        else std::memcpy(&bits, &value, sizeof value);
        return bits;
    }
    int fits = 0;
    int64_t value = lua_tointegerx(L, index, &fits);
    MOE_CHECK(fits, usage, what(k, i), got_text(L, index), "an integer", p.type);
    if (p.bytes < 8) {
        int64_t range = int64_t(1) << (8 * p.bytes), low = p.is_unsigned ? 0 : -range / 2, high = low + range - 1;
        MOE_CHECK(value >= low && value <= high, usage, what(k, i), std::to_string(value), fmt::format("{} … {}", low, high), p.type);
    } else {
        MOE_CHECK(value >= 0 || !p.is_unsigned, usage, what(k, i), std::to_string(value), "0 or more", p.type);
    }
    std::memcpy(&bits, &value, p.bytes);
    return bits;
}
Tensor tensor_argument(lua_State* L, int index, const Kernel& k, size_t i) {
    auto& p = k.signature.parameters[i];
    if (lua_isnil(L, index)) return {};
    if (!test_box<Tensor>(L, index)) MOE_THROW(usage, what(k, i), got_text(L, index), "a tensor, or nil for a null pointer", p.type);
    Tensor& t = check_tensor(L, index, "argument");
    MOE_CHECK(!p.dtype || t.scalar_type() == *p.dtype, dtype, what(k, i), dtype_text(t.scalar_type()), dtype_text(p.dtype.value_or(t.scalar_type())), p.type);
    MOE_CHECK(t.is_contiguous(), shape, what(k, i), "a tensor that is not contiguous", "a contiguous one", "t:contiguous()");
    return t;
}
/// Arguments from stack index `first` on; checked in full before anything of a GPU is asked for.
Arguments arguments_of(lua_State* L, int first, int count, const Kernel& k) {
    auto& parameters = k.signature.parameters;
    MOE_CHECK(size_t(count) == parameters.size(), usage, k.signature.name, fmt::format("{} arguments", count), std::to_string(parameters.size()), "help(kernel) shows them");
    Arguments a;
    for (size_t i = 0; i < parameters.size(); ++i) {
        int index = first + int(i);
        Tensor t = parameters[i].is_pointer ? tensor_argument(L, index, k, i) : Tensor();
        a.tensors.push_back(t);
        a.values.push_back(parameters[i].is_pointer ? uint64_t(t.defined() ? t.data_ptr() : nullptr) : number_argument(L, index, k, i));
    }
    bool found = false;
    for (size_t i = 0; i < parameters.size(); ++i) {
        const Tensor& t = a.tensors[i];
        if (!t.defined()) continue;
        MOE_CHECK(t.is_cuda(), device, what(k, i), t.device().str(), "a tensor on a GPU", "t:cuda()");
        MOE_CHECK(!found || t.device() == a.device, device, what(k, i), t.device().str(), a.device.str(), "all tensors of a launch are on one device");
        a.device = t.device();
        found = true;
    }
    require_cuda_device(k.signature.name);
    if (!found) a.device = Guard(at::kCUDA).getDevice();
    for (auto& v : a.values) a.pointers.push_back(&v);
    return a;
}

// --- launching ---

struct Launch {
    std::array<unsigned, 3> grid{1, 1, 1}, block{1, 1, 1};
    unsigned shared = 0;
    std::optional<c10::Stream> stream;
};
std::array<unsigned, 3> three(lua_State* L, const Options& o, const char* name) {
    std::array<unsigned, 3> out{1, 1, 1};
    o.push(name);
    if (lua_isnil(L, -1)) MOE_THROW(usage, std::string("launch: ") + name, "nothing", "a number, or a table of up to three", "k:launch{grid = …, block = …}(…)");
    std::vector<int64_t> sizes = lua_istable(L, -1) ? check_integers(L, lua_gettop(L), name) : std::vector<int64_t>{check_integer(L, -1, name)};
    lua_pop(L, 1);
    MOE_CHECK(!sizes.empty() && sizes.size() <= 3, usage, std::string("launch: ") + name, fmt::format("{} sizes", sizes.size()), "1 to 3", "");
    for (size_t i = 0; i < sizes.size(); ++i) {
        int64_t most = name[0] == 'b' ? (i == 2 ? 64 : 1024) : (i == 0 ? 0x7fffffff : 65535);
        MOE_CHECK(sizes[i] > 0 && sizes[i] <= most, usage, std::string("launch: ") + name, std::to_string(sizes[i]), fmt::format("1 … {}", most), "");
        out[i] = unsigned(sizes[i]);
    }
    return out;
}
Launch launch_of(lua_State* L, int index) {
    check_table(L, index, "launch");
    Options o(L, index, {"grid", "block", "shared", "stream"});
    Launch l{three(L, o, "grid"), three(L, o, "block"), 0, {}};
    int64_t shared = o.integer("shared", 0);
    MOE_CHECK(shared >= 0 && shared <= 232448, usage, "launch: shared", std::to_string(shared), "0 … 232448 bytes", "");
    l.shared = unsigned(shared);
    o.push("stream");
    if (!lua_isnil(L, -1)) l.stream = check<c10::Stream>(L, lua_gettop(L), "stream");
    lua_pop(L, 1);
    return l;
}
void run(const Kernel& k, const Launch& l, Arguments& a) {
    Guard guard(at::kCUDA);
    struct Back {
        Guard& guard;
        c10::Device device;
        ~Back() { guard.uncheckedSetDevice(device); }
    } back{guard, guard.exchangeDevice(a.device)};
    c10::Stream stream = l.stream.value_or(guard.getStream(a.device));
    MOE_CHECK(stream.device() == a.device, device, k.signature.name + ": stream", stream.device().str(), a.device.str(), "");
    k.module->launch(k.lowered, a.device, l.grid, l.block, l.shared, guard.getStreamNativeHandle(stream), a.pointers.data());
    if (l.stream) {
        // The memory must not be given to others before that stream is done with it.
        for (auto& t : a.tensors) {
            if (t.defined()) guard.recordDataPtrOnStream(t.storage().data_ptr(), stream);
        }
    }
}

/// k({grid =, block =}, …)
int call_kernel(lua_State* L) {
    Kernel& k = self<Kernel>(L);
    Launch l = launch_of(L, 2);
    Arguments a = arguments_of(L, 3, lua_gettop(L) - 2, k);
    run(k, l, a);
    return 0;
}
/// k:launch{grid =, block =}: a function of the arguments. Upvalues: kernel, options.
int launched(lua_State* L) {
    int n = lua_gettop(L);
    lua_pushvalue(L, upvalue(1));
    lua_pushvalue(L, upvalue(2));
    Kernel& k = check<Kernel>(L, n + 1, "kernel");
    Launch l = launch_of(L, n + 2);
    Arguments a = arguments_of(L, 1, n, k);
    run(k, l, a);
    return 0;
}
int launch(lua_State* L) {
    self<Kernel>(L);
    launch_of(L, 2);
    lua_settop(L, 2);
    push_function(L, {"launch", launched, "k:launch{…}(…): launches the kernel with these arguments."}, "cuda kernel:launch", 2);
    return 1;
}

// --- times ---

/// Seconds of each of `repeat` calls of what call() runs, by events of the device's current stream.
template <class Call>
std::vector<double> measured(int64_t warmup, int64_t repeat, Call call) {
    Guard guard(at::kCUDA);
    c10::Device device = guard.getDevice();
    c10::Stream stream = guard.getStream(device);
    struct Events {
        Guard guard;
        c10::Device device;
        std::vector<void*> list;
        ~Events() {
            for (void* e : list) guard.destroyEvent(e, device.index());
        }
    } events{guard, device, std::vector<void*>(size_t(2 * repeat))};
    for (int64_t i = 0; i < warmup; ++i) call();
    for (int64_t i = 0; i < repeat; ++i) {
        guard.record(&events.list[size_t(2 * i)], stream, device.index(), c10::EventFlag::BACKEND_DEFAULT);
        call();
        guard.record(&events.list[size_t(2 * i + 1)], stream, device.index(), c10::EventFlag::BACKEND_DEFAULT);
    }
    guard.synchronizeStream(stream);
    std::vector<double> secs;
    for (int64_t i = 0; i < repeat; ++i) secs.push_back(1e-3 * guard.elapsedTime(events.list[size_t(2 * i)], events.list[size_t(2 * i + 1)], device.index()));
    std::sort(secs.begin(), secs.end());
    return secs;
}
double median(const std::vector<double>& sorted) { return (sorted[sorted.size() / 2] + sorted[(sorted.size() - 1) / 2]) / 2; }
int64_t repeats(const Options& o) {
    int64_t n = o.integer("repeats", 20);
    MOE_CHECK(n > 0 && n <= 100000, usage, "repeats", std::to_string(n), "1 … 100000", "");
    return n;
}

int time(lua_State* L) {
    check_function(L, 1, "f");
    Options o(L, 2, {"repeats", "warmup"});
    int64_t repeat = repeats(o), warmup = std::max<int64_t>(o.integer("warmup", 3), 0);
    require_cuda_device("moe.cuda.time");
    auto secs = measured(warmup, repeat, [&] {
        lua_pushvalue(L, 1);
        lua_call(L, 0, 0);
    });
    double sum = 0;
    for (double s : secs) sum += s;
    push_ordered_table(L, {"median_secs", "least_secs", "mean_secs", "repeats"});
    for (auto [name, value] : {std::pair("median_secs", median(secs)), std::pair("least_secs", secs[0]), std::pair("mean_secs", sum / double(repeat))}) {
        lua_pushnumber(L, value);
        lua_setfield(L, -2, name);
    }
    lua_pushinteger(L, repeat);
    lua_setfield(L, -2, "repeats");
    return 1;
}

/// k:compare(reference, launch, {…}, {rtol =, atol =, repeat =})
int compare(lua_State* L) {
    Kernel& k = self<Kernel>(L);
    check_function(L, 2, "reference");
    Launch l = launch_of(L, 3);
    check_table(L, 4, "arguments");
    Options o(L, 5, {"rtol", "atol", "repeats"});
    double rtol = o.number("rtol", 1e-4), atol = o.number("atol", 1e-5);
    int64_t repeat = repeats(o);
    int n = int(k.signature.parameters.size());
    luaL_checkstack(L, 3 * n + 20, "arguments");
    auto copies = [&] {
        int first = lua_gettop(L) + 1;
        for (int i = 1; i <= n; ++i) {
            lua_rawgeti(L, 4, i);
            if (!test_box<Tensor>(L, -1)) continue;
            Tensor copy = check_tensor(L, lua_gettop(L), "argument").clone();
            lua_pop(L, 1);
            push_tensor(L, copy);
        }
        return first;
    };
    MOE_CHECK(int(lua_rawlen(L, 4)) <= n, usage, "compare: arguments", std::to_string(lua_rawlen(L, 4)), std::to_string(n), "");
    int ours = copies();
    Arguments a = arguments_of(L, ours, n, k);
    run(k, l, a);
    int theirs = copies();
    auto reference = [&](int results) {
        lua_pushvalue(L, 2);
        for (int i = 0; i < n; ++i) lua_pushvalue(L, theirs + i);
        lua_call(L, n, results);
    };
    int top = lua_gettop(L);
    reference(LUA_MULTRET);
    int given = lua_gettop(L) - top;
    double most = 0;
    bool ok = true, any = false;
    int output = 0;
    for (int i = 0; i < n; ++i) {
        auto& p = k.signature.parameters[size_t(i)];
        if (!p.is_pointer || p.is_read_only || !a.tensors[size_t(i)].defined()) continue;
        int place = given > 0 ? top + 1 + output : theirs + i;
        ++output;
        if (given > 0 && output > given) break;
        Tensor got = a.tensors[size_t(i)].to(at::kDouble), want = check_tensor(L, place, "result of the reference").to(at::kDouble).to(got.device());
        MOE_CHECK(got.sizes() == want.sizes(), shape, "compare: " + what(k, size_t(i)), shape_text(want.sizes()) + " of the reference", shape_text(got.sizes()), "");
        ok = ok && at::allclose(got, want, rtol, atol, true);
        if (got.numel()) most = std::max(most, (got - want).abs().max().item<double>());
        if (std::isnan((got - want).sum().item<double>())) most = std::numeric_limits<double>::quiet_NaN();
        any = true;
    }
    MOE_CHECK(any, usage, k.signature.name + ":compare", "a kernel that writes nothing", "a pointer parameter that is not const", "");
    lua_settop(L, top);
    double kernel_secs = median(measured(2, repeat, [&] { run(k, l, a); })), reference_secs = median(measured(2, repeat, [&] { reference(0); }));
    push_ordered_table(L, {"ok", "max_error", "kernel_secs", "reference_secs", "speedup"});
    lua_pushboolean(L, ok);
    lua_setfield(L, -2, "ok");
    for (auto [name, value] : {std::pair("max_error", most), std::pair("kernel_secs", kernel_secs), std::pair("reference_secs", reference_secs), std::pair("speedup", reference_secs / kernel_secs)}) {
        lua_pushnumber(L, value);
        lua_setfield(L, -2, name);
    }
    return 1;
}

int attributes(lua_State* L) {
    Kernel& k = self<Kernel>(L);
    require_cuda_device(k.signature.name);
    push_ordered_table(L, {"registers", "shared_bytes", "local_bytes", "max_threads"});
    at::zeros({1}, at::Device(at::kCUDA));                // the device's context, where nothing has made it yet
    for (auto& [name, value] : k.module->attributes(k.lowered, Guard(at::kCUDA).getDevice())) {
        lua_pushinteger(L, value);
        lua_setfield(L, -2, name.c_str());
    }
    return 1;
}

int field_name(lua_State* L) { return push_string(L, self<Kernel>(L).signature.name), 1; }
int field_log(lua_State* L) { return push_string(L, self<Kernel>(L).log), 1; }
int field_parameters(lua_State* L) {
    Kernel& k = self<Kernel>(L);
    lua_createtable(L, int(k.signature.parameters.size()), 0);
    lua_Integer i = 0;
    for (auto& p : k.signature.parameters) {
        push_ordered_table(L, {"name", "type", "dtype", "read_only"});
        push_string(L, p.name);
        lua_setfield(L, -2, "name");
        push_string(L, p.type);
        lua_setfield(L, -2, "type");
        push_string(L, p.dtype ? dtype_text(*p.dtype) : "any");
        lua_setfield(L, -2, "dtype");
        lua_pushboolean(L, p.is_read_only);
        lua_setfield(L, -2, "read_only");
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}
int kernel_text(lua_State* L) {
    auto* box = test_box<Kernel>(L, 1);
    if (!box || !*box) return push_string(L, "cuda kernel (freed)"), 1;
    std::string list;
    for (auto& p : (*box)->signature.parameters) list += fmt::format("{}{}{}{}{}", list.empty() ? "" : ", ", p.is_read_only ? "const " : "", p.type, p.name.empty() ? "" : " ", p.name);
    push_string(L, "cuda kernel " + (*box)->signature.name + "(" + list + ")");
    return 1;
}
const Binding kKernelMethods[] = {
    {"launch", launch, "k:launch{grid =, block =, shared = 0, stream =}(…): launches the kernel; grid and block: a number or up to three, shared: bytes. Arguments by the kernel's signature: tensors on a GPU of\nthe pointer's dtype (nil: a null pointer), integers in range, numbers, booleans."},
    {"compare", compare,
     "k:compare(reference, {grid =, block =}, {arguments}, {rtol = 1e-4, atol = 1e-5, repeats = 20}): runs the kernel and a function of the same arguments, each on copies, and compares what\n"
     "the kernel writes (pointers that are not const) with what the reference gives, or has written. A table: ok, max_error, kernel_secs, reference_secs, speedup (medians, by events)."},
    {"attributes", attributes, "k:attributes(): registers a thread, shared_bytes and local_bytes, max_threads a block."},
};
const Binding kKernelFields[] = {
    {"name", field_name, "k.name: the kernel's name."},
    {"parameters", field_parameters, "k.parameters: a list of {name, type, dtype, read_only}."},
    {"log", field_log, "k.log: the compiler's warnings, \"\" without any."},
};
const Binding kKernelOperators[] = {
    {"__call", call_kernel, "k({grid =, block =, …}, …): launches the kernel, as k:launch{…}(…)."},
    {"__tostring", kernel_text, "tostring(k): its signature."},
};

int available(lua_State* L) { return lua_pushboolean(L, has_cuda_device()), 1; }
const Binding kFunctions[] = {
    {"compile", compile,
     "moe.cuda.compile(source, {name =, options = {}, headers = {[\"x.h\"] = text}, include = {folders}, arch =}): the kernel of a CUDA source (several: a table by name, or that called name),\n"
     "compiled by NVRTC for the GPU here (sm_90 without one, or arch). Errors are of kind cuda, their place a line of the script, `log` all that the compiler says. CUDA's headers (cuda_fp16.h,\n"
     "cuda_bf16.h) can be included. Parameters: pointers to numbers, and numbers.\n"
     "local k = moe.cuda.compile [[ extern \"C\" __global__ void twice(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] *= 2; } ]]\n"
     "k:launch{grid = 4, block = 256}(x, 1000)"},
    {"available", available, "moe.cuda.available(): true where there is a GPU that this build can use.\nExample: print(moe.cuda.available())"},
    {"time", time, "moe.cuda.time(f, {repeats = 20, warmup = 3}): seconds of f() on the GPU, by events: {median_secs, least_secs, mean_secs, repeats}."},
};
}  // namespace

void open_cuda(lua_State* L) {
    register_type<Kernel>(L, {.name = nullptr, .help = "cuda kernel: compiled by moe.cuda.compile; k:launch{grid =, block =}(…) runs it.", .methods = kKernelMethods, .fields = kKernelFields, .meta = kKernelOperators});
    lua_newtable(L);
    set_functions(L, "moe.cuda.", kFunctions);
    add_cuda_streams(L);
    set_help(L, -1, "moe.cuda", "moe.cuda: kernels written in a script: compiled, launched, timed and compared with a reference; streams.");
    lua_setfield(L, -2, "cuda");
}
}  // namespace moe::lua

#include "lua/bind/cuda_stream.h"

#include "lua/bind/cuda_library.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace moe::lua {
namespace {
using Guard = c10::impl::VirtualGuardImpl;

int make_stream(lua_State* L) {
    Options o(L, 1, {"device", "priority"});
    require_cuda_device("moe.cuda.stream");
    at::Device device = device_named(o.string("device", "cuda"));
    if (!device.has_index()) device = Guard(at::kCUDA).getDevice();
    push(L, Guard(at::kCUDA).getStreamFromGlobalPool(device, o.string("priority", "normal") == "high"));
    return 1;
}
int synchronize_stream(lua_State* L) { return Guard(at::kCUDA).synchronizeStream(self<c10::Stream>(L)), lua_settop(L, 1), 1; }
int run_on(lua_State* L) {
    c10::Stream stream = self<c10::Stream>(L);
    check_function(L, 2, "f");
    struct Restore {
        c10::Stream before;
        ~Restore() { Guard(at::kCUDA).exchangeStream(before); }
    } restore{Guard(at::kCUDA).exchangeStream(stream)};
    lua_call(L, lua_gettop(L) - 2, LUA_MULTRET);
    return lua_gettop(L) - 1;
}
int wait_for(lua_State* L) {
    Guard guard(at::kCUDA);
    c10::Stream stream = self<c10::Stream>(L), other = is_nothing(L, 2) ? guard.getStream(stream.device()) : check<c10::Stream>(L, 2, "other");
    void* event = nullptr;
    guard.record(&event, other, other.device_index(), c10::EventFlag::PYTORCH_DEFAULT);
    guard.block(event, stream);
    guard.destroyEvent(event, other.device_index());
    return lua_settop(L, 1), 1;
}
int stream_text(lua_State* L) {
    auto* box = test_box<c10::Stream>(L, 1);
    push_string(L, box && *box ? fmt::format("cuda stream {} of {}", (*box)->id(), (*box)->device().str()) : "cuda stream (freed)");
    return 1;
}
const Binding kStreamMethods[] = {
    {"synchronize", synchronize_stream, "s:synchronize(): waits until all work given to the stream is done. Returns s."},
    {"wait", wait_for, "s:wait(other): work given to s from now on starts after what other (the current stream unless given) has now. Returns s."},
    {"run", run_on, "s:run(f, …): f(…) with s as the current stream: tensor operations and kernels go to it. Gives what f gives."},
};
const Binding kStreamOperators[] = {{"__tostring", stream_text, "tostring(s): its number and device."}};

int synchronize(lua_State* L) {
    require_cuda_device("moe.cuda.synchronize");
    Guard(at::kCUDA).synchronizeDevice(Guard(at::kCUDA).getDevice().index());
    return 0;
}
const Binding kFunctions[] = {
    {"stream", make_stream, "moe.cuda.stream({device = \"cuda\", priority = \"normal\" | \"high\"}): a stream of a GPU from LibTorch's pool."},
    {"synchronize", synchronize, "moe.cuda.synchronize(): waits until the GPU has done all its work; errors of kernels show here."},
};
}  // namespace

void add_cuda_streams(lua_State* L) {
    register_type<c10::Stream>(L, {.name = nullptr, .help = "cuda stream: work of a GPU in order, from moe.cuda.stream().", .methods = kStreamMethods, .fields = {}, .meta = kStreamOperators});
    set_functions(L, "moe.cuda.", kFunctions);
}
}  // namespace moe::lua

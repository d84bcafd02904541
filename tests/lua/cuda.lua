-- moe.cuda: signatures, compiling and its errors anywhere that NVIDIA's compiler is; launches and times on a GPU.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

local ok, err = pcall(moe.cuda.compile, 'extern "C" __global__ void f(float* x) { x[0] = 1; }')
if not ok and err.kind == "device" then
  print("skipped: " .. tostring(err))
  return
end

local TWICE = [[
extern "C" __global__ void twice(float* __restrict__ x, const int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= 2;
}
]]

test("cuda: a kernel knows its signature", function()
  local k = moe.cuda.compile(TWICE)
  equal(k.name, "twice")
  equal(tostring(k), "cuda kernel twice(float* x, int n)")
  equal(k.parameters[1].dtype, "float32")
  equal(k.parameters[2].type, "int")
end)

test("cuda: signatures with all kinds of spelling", function()
  local k = moe.cuda.compile [[
    #include <cuda_bf16.h>
    // __global__ void comment(int x);
    template <typename T> __global__ void generic(T* x) { *x = T(1); }
    __device__ float helper(float a) { return a; }
    extern "C" __global__ void __launch_bounds__(128, 2) a(const __nv_bfloat16 *x, double* const y, unsigned long long seed, /* a comment, with commas */
        bool flag, long long m, unsigned char z[], const void* any) {}
    __global__ void b() {}
    extern "C" { __global__ void c(void) {} }
  ]]
  equal(tostring(k.a), "cuda kernel a(const __nv_bfloat16* x, double* y, unsigned long long seed, bool flag, long long m, unsigned char* z, const void* any)")
  equal(k.a.parameters[1].dtype, "bfloat16")
  equal(k.a.parameters[1].read_only, true)
  equal(k.a.parameters[2].read_only, false)
  equal(k.a.parameters[6].dtype, "uint8")
  equal(#k.b.parameters, 0)
  equal(#k.c.parameters, 0)
  equal(k.generic, nil)
  equal(moe.cuda.compile(TWICE, { name = "twice" }).name, "twice")
  raises("usage", function() return moe.cuda.compile(TWICE, { name = "thrice" }) end, "twice")
  raises("usage", function() return moe.cuda.compile "int x;" end, "__global__")
  raises("usage", function() return moe.cuda.compile 'struct S { int a; }; extern "C" __global__ void f(S s) {}' end, "S s")
  raises("usage", function() return moe.cuda.compile 'extern "C" __global__ void f(float** x) {}' end)
  raises("usage", function() return moe.cuda.compile 'extern "C" __global__ void f(int& x) {}' end)
  raises("usage", function() return moe.cuda.compile(3) end)
  raises("usage", function() return moe.cuda.compile(TWICE, { optoins = {} }) end, "options")
end)

test("cuda: errors of the compiler at the script's line", function()
  local line = debug.getinfo(1, "l").currentline
  local e = raises("cuda", function()
    return moe.cuda.compile [[
      extern "C" __global__ void f(float* x) {
        x[0] = undefined_name;
      }
    ]]
  end, "undefined_name")
  equal(e.where:match("cuda.lua:(%d+)$"), tostring(line + 4))
  check.contains(e.log, "undefined_name")
  e = raises("cuda", function() return moe.cuda.compile 'extern "C" __global__ void f(float* x) { x[0] = y; }' end)
  equal(e.where:match("cuda.lua:(%d+)$"), tostring(line + 10))
  raises("cuda", function() return moe.cuda.compile(TWICE, { options = { "--no-such-option" } }) end)
end)

test("cuda: options, headers and architectures", function()
  local k = moe.cuda.compile([[
    #include "three.h"
    extern "C" __global__ void f(float* x) { x[0] = THREE + OTHER; }
  ]], { headers = { ["three.h"] = "#define THREE 3" }, options = { "-DOTHER=4" }, arch = "sm_80" })
  equal(k.log, "")
end)

test("cuda: arguments are checked before a launch", function()
  local k = moe.cuda.compile [[ extern "C" __global__ void f(float* x, int n, unsigned char small, bool flag, float a) {} ]]
  local go, x = k:launch { grid = 1, block = 32 }, moe.ones { 4 }
  raises("usage", function() go(x, 1) end, "2 arguments", "5")
  raises("dtype", function() go(x:double(), 1, 2, true, 0.5) end, "argument 1, x", "float64", "float32")
  raises("usage", function() go(3, 1, 2, true, 0.5) end, "a tensor")
  raises("usage", function() go(x, 1.5, 2, true, 0.5) end, "an integer")
  raises("usage", function() go(x, 2 ^ 31, 2, true, 0.5) end, "2147483647")
  raises("usage", function() go(x, 1, 256, true, 0.5) end, "0 … 255")
  raises("usage", function() go(x, 1, 2, 1, 0.5) end, "true or false")
  raises("usage", function() go(x, 1, 2, true, "a") end, '"a"')
  raises("shape", function() go(moe.ones({ 4, 4 }).T["1:"], 1, 2, true, 0.5) end, "contiguous")
  raises("device", function() go(x, 1, 2, true, 0.5) end, "cpu")
  raises("device", function() k({ grid = 1, block = 32 }, x, 1, 2, true, 0.5) end, "cpu")
  raises("usage", function() k:launch { grid = 1 } end, "block")
  raises("usage", function() k:launch { grid = 0, block = 1 } end, "grid")
  raises("usage", function() k:launch { grid = 1, block = 2000 } end, "1024")
  raises("usage", function() k:launch { grid = { 1, 1, 1, 1 }, block = 1 } end)
  raises("usage", function() k:launch { grid = 1, block = 1, sharde = 3 } end, "shared")
end)

if not moe.cuda.available() then
  test("cuda: without a GPU everything that needs one says so", function()
    local k = moe.cuda.compile(TWICE)
    raises("device", function() k({ grid = 1, block = 1 }, nil, 4) end, "GPU")
    raises("device", function() return moe.cuda.stream() end)
    raises("device", function() return moe.cuda.synchronize() end)
    raises("device", function() return moe.cuda.time(function() end) end)
    raises("device", function() return k:attributes() end)
  end)
  print("skipped: launches, streams and times: no GPU")
  return check.done()
end

test("cuda: a launch changes its tensor, whatever the spelling", function()
  local k, x = moe.cuda.compile(TWICE), moe.arange(1000):float():cuda()
  k:launch { grid = 4, block = 256 } (x, 1000)
  k({ grid = { 4, 1 }, block = { 256 } }, x, 500)
  equal(x[10]:item(), 40)
  equal(x[700]:item(), 1400)
  local a = k:attributes()
  is(a.registers > 0 and a.max_threads >= 256)
  raises("usage", function() k({ grid = 1, block = 1 }, x, 1.5) end)
end)

test("cuda: all kinds of arguments, and dynamic shared memory", function()
  local k = moe.cuda.compile [[
    #include <cuda_bf16.h>
    extern "C" __global__ void f(double* out, const __nv_bfloat16* b, unsigned char u, short s, long long l, float x, double y, bool flag, const float* none) {
      extern __shared__ float room[];
      room[16000] = 1;
      out[0] = double(__bfloat162float(b[0])); out[1] = u; out[2] = s; out[3] = double(l); out[4] = x; out[5] = y; out[6] = flag; out[7] = none == nullptr; out[8] = room[16000];
    }
  ]]
  local out = moe.zeros({ 9 }, { dtype = "fp64", device = "cuda" })
  k({ grid = 1, block = 1, shared = 65536 }, out, moe.full({ 1 }, 1.5, { dtype = "bf16", device = "cuda" }), 200, -5, 1 << 40, 0.25, 1e-300, true, nil)
  local got = out:to_table()
  for i, want in ipairs { 1.5, 200, -5, 2.0 ^ 40, 0.25, 1e-300, 1, 1, 1 } do equal(got[i], want, "argument " .. i) end
end)

test("cuda: compared with a reference, and timed", function()
  local k, x = moe.cuda.compile(TWICE), moe.randn({ 1 << 20 }, { device = "cuda" })
  local before = x:clone()
  local r = k:compare(function(t) return t * 2 end, { grid = 4096, block = 256 }, { x, 1 << 20 })
  is(r.ok and r.max_error == 0 and r.kernel_secs > 0 and r.reference_secs > 0)
  is(x:eq(before):all(), "arguments are copies")
  is(k:compare(function(t) t:mul_(2) end, { grid = 4096, block = 256 }, { x, 1 << 20 }).ok)
  is(not k:compare(function(t) return t * 3 end, { grid = 4096, block = 256 }, { x, 1 << 20 }).ok)
  local t = moe.cuda.time(function() k({ grid = 4096, block = 256 }, x, 1 << 20) end, { repeats = 10 })
  is(t.least_secs > 0 and t.least_secs < 1e-3 and t.median_secs >= t.least_secs)
end)

test("cuda: streams", function()
  local k, s, x = moe.cuda.compile(TWICE), moe.cuda.stream(), moe.ones({ 64 }, { device = "cuda" })
  s:wait()
  k({ grid = 1, block = 64, stream = s }, x, 64)
  s:synchronize()
  equal(x:sum():item(), 128)
  local y = s:run(function() return x + 1 end)
  moe.cuda.synchronize()
  equal(y[0]:item(), 3)
end)

test("cuda: an operator of two kernels", function()
  local k = moe.cuda.compile(TWICE)
  local twice = moe.autograd {
    forward = function(_, x) local y = x:clone() k({ grid = 1, block = 64 }, y, y:numel()) return y end,
    backward = function(_, g) g = g:clone() k({ grid = 1, block = 64 }, g, g:numel()) return g end,
  }
  local x = moe.ones({ 10 }, { device = "cuda", requires_grad = true })
  twice(x):sum():backward()
  equal(x.grad:sum():item(), 20)
end)

test("cuda: ids out of range are refused before a kernel sees them", function()
  local t = moe.arange(4):cuda()
  raises("shape", function() return t[moe.tensor { 4 }] end)
  raises("shape", function() return t:gather(0, moe.tensor({ 4 }):cuda()) end)
  raises("shape", function() return t:index_select(0, moe.tensor({ 9 }):cuda()) end)
  moe.cuda.synchronize()
end)

check.done()

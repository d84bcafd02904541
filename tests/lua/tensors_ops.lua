-- Reductions, elementwise functions, order, selection, shapes and draws against plain Lua.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises
local fp64 = { dtype = "fp64" }

local function flat(t) return table.concat(t:reshape { -1 }:to_table(), ",") end
local function shape(t) return tostring(t.shape) end
local function same(t, list, tolerance)
  local got = t:reshape { -1 }:to_table()
  equal(#got, #list)
  for i, v in ipairs(list) do near(got[i], v, tolerance or 1e-12) end
end

test("ops: elementwise functions against math", function()
  local values = { -1.5, -0.25, 0.5, 2.5 }
  local t = moe.tensor(values, fp64)
  local functions = {
    exp = math.exp, abs = math.abs, sin = math.sin, cos = math.cos, tan = math.tan, floor = math.floor, ceil = math.ceil,
    square = function(x) return x * x end, reciprocal = function(x) return 1 / x end, sign = function(x) return x > 0 and 1 or -1 end, neg = function(x) return -x end,
    sigmoid = function(x) return 1 / (1 + math.exp(-x)) end, relu = function(x) return math.max(x, 0) end, silu = function(x) return x / (1 + math.exp(-x)) end,
    tanh = function(x) return (math.exp(2 * x) - 1) / (math.exp(2 * x) + 1) end, softplus = function(x) return math.log(1 + math.exp(x)) end, expm1 = function(x) return math.exp(x) - 1 end,
    trunc = function(x) return x < 0 and math.ceil(x) or math.floor(x) end, gelu = function(x) return x * (1 + moe.tensor({ x / math.sqrt(2) }, fp64):erf():item()) / 2 end,
  }
  for name, f in pairs(functions) do
    local got = t[name](t):to_table()
    for i, v in ipairs(values) do near(got[i], f(v), 1e-12, name) end
  end
  local positive = { 0.25, 1, 3 }
  for name, f in pairs { log = math.log, sqrt = math.sqrt, rsqrt = function(x) return 1 / math.sqrt(x) end, log1p = function(x) return math.log(1 + x) end,
    log2 = function(x) return math.log(x, 2) end, log10 = function(x) return math.log(x, 10) end } do
    local p = moe.tensor(positive, fp64)
    local got = p[name](p):to_table()
    for i, v in ipairs(positive) do near(got[i], f(v), 1e-12, name) end
  end
  same(moe.tensor({ 0.5, 1.5, -0.5 }, fp64):round(), { 0, 2, 0 })
  near(moe.tensor({ 1.0 }, fp64):erf():item(), 0.8427007929497149, 1e-12)
  raises("usage", function() return t:gelu("fast") end, "tanh")
end)

test("ops: binary functions, logic and clamps", function()
  local a, b = moe.tensor({ 1, 5, 3 }, fp64), moe.tensor({ 4, 2, 3 }, fp64)
  same(a:maximum(b), { 4, 5, 3 })
  same(a:min(b), { 1, 2, 3 })
  same(a:pow(2), { 1, 25, 9 })
  same(a:clamp(2, 4), { 2, 4, 3 })
  same(a:clamp(nil, 4), { 1, 4, 3 })
  same(a:clamp(b), { 4, 5, 3 })
  equal((moe.arange(3):max(moe.tensor { 0.5, 0.5, 0.5 })).dtype, "float32", "types are promoted")
  equal(flat(a:gt(2):logical_and(b:gt(2)):long()), "0,0,1")
  equal(flat(a:gt(2):logical_or(b:gt(2)):long()), "1,1,1")
  equal(flat(a:gt(2):logical_xor(b:gt(2)):long()), "1,1,0")
  equal(flat(a:gt(2):logical_not():long()), "1,0,0")
  local odd = moe.tensor { 0 / 0, math.huge, 1.0 }
  equal(flat(odd:isnan():long()), "1,0,0")
  equal(flat(odd:isinf():long()), "0,1,0")
  equal(flat(odd:isfinite():long()), "0,0,1")
  same(moe.where(a:gt(2), a, -1), { -1, 5, 3 })
  raises("shape", function() return a:maximum(moe.ones { 2 }) end, "[3] and [2]")
  raises("shape", function() return moe.where(a:gt(2), a, moe.ones { 2 }) end, "[3] and [2]")
  raises("usage", function() return a:clamp() end)
  raises("usage", function() return a + "1" end)
  raises("usage", function() return a + {} end, "tensor + …: ", "a table")
  raises("usage", function() a[0] = "x" end, "tensor[…] = …: value: got \"x\"")
end)

test("ops: reductions against loops, dims alone, negative and several", function()
  local rows = { { 1, 5, 3 }, { 4, 2, 6 } }
  local t = moe.tensor(rows, fp64)
  same(t:sum(-1), { 9, 12 })
  equal(t:sum({ 0, 1 }):item(), 21)
  same(t:mean(0), { 2.5, 3.5, 4.5 })
  same(t:prod(1), { 15, 48 })
  near(t:var():item(), 17.5 / 5)
  near(t:std(1)[0]:item(), 2)
  near(t:var(1, { correction = 0 })[1]:item(), 8 / 3)
  local values, ids = t:max(1)
  same(values, { 5, 6 })
  equal(flat(ids), "1,2")
  values, ids = t:min(1, { keepdim = true })
  equal(shape(values), "[2, 1]")
  same(t:amax({ 0, 1 }, { keepdim = true }), { 6 })
  same(t:amin(0), { 1, 2, 3 })
  equal(t:median():item(), 3)
  equal(t:argmin():item(), 0)
  equal(flat(t:argmax(0)), "1,0,1")
  same(t:cumsum(1), { 1, 6, 9, 4, 6, 12 })
  same(t:cumprod(0), { 1, 5, 3, 4, 10, 18 })
  near(t:logsumexp(1)[0]:item(), math.log(math.exp(1) + math.exp(5) + math.exp(3)), 1e-12)
  near(t:logsumexp():item(), t:exp():sum():log():item(), 1e-12)
  near(t:norm(1, { p = 1 })[1]:item(), 12)
  near(t:norm({ 0, 1 }):item(), math.sqrt(91), 1e-12)
  near(t:log_softmax(0):exp():sum():item(), 3, 1e-12)
  equal(t:gt(1):all(), false)
  equal(t:gt(0):all(), true)
  equal(t:gt(5):any(), true)
  equal(flat(t:gt(4):any(1):long()), "1,1")
  equal(flat(t:gt(1):all(0):long()), "0,1,1")
  raises("shape", function() return t:sum { 0, 2 } end, "2 of [2, 3]")
  raises("shape", function() return t:cumsum(2) end)
  raises("usage", function() return t:sum(0, { keep_dim = true }) end, "keepdim")
end)

test("ops: order and selection", function()
  local t = moe.tensor { { 3, 1, 2 }, { 6, 5, 4 } }
  local values, ids = t:sort(1)
  equal(flat(values), "1,2,3,4,5,6")
  equal(flat(ids), "1,2,0,2,1,0")
  equal(flat(t:argsort(1, { descending = true })), "0,2,1,0,1,2")
  values, ids = t:topk(1, 0, { largest = false })
  equal(flat(values), "3,1,2")
  equal(flat(t:gather(1, moe.tensor { { 2 }, { 0 } })), "2,6")
  equal(flat(moe.zeros({ 4 }):scatter_add(0, moe.tensor { 1, 3, 3 }, moe.tensor { 1, 2, 3 }):long()), "0,1,0,5")
  equal(flat(moe.zeros({ 4 }):scatter(0, moe.tensor { 2 }, 7):long()), "0,0,7,0")
  equal(flat(t:index_select(1, moe.tensor { 2, 0 })), "2,3,4,6")
  equal(flat(t:index_add(0, moe.tensor { 0, 0 }, t)), "12,7,8,6,5,4")
  equal(flat(t:masked_fill(t:gt(4), 0)), "3,1,2,0,0,4")
  equal(flat(t:masked_select(t:gt(4))), "6,5")
  equal(flat(t:gt(4):nonzero()), "1,0,1,1")
  local unique, counts, inverse = moe.tensor({ 5, 3, 5, 5 }):unique()
  equal(flat(unique), "3,5")
  equal(flat(counts), "1,3")
  equal(flat(inverse), "1,0,1,1")
  equal(flat(moe.tensor({ 0, 2, 2 }):bincount(4)), "1,0,2,0")
  equal(flat(moe.tensor({ 0, 2, 2 }):bincount(0, { weights = moe.tensor({ 1.0, 2.0, 3.0 }, fp64) }):long()), "1,0,5")
  equal(flat(moe.tensor({ 0.1, 0.6, 0.9 }):histc(2, 0, 1):long()), "1,2")
  equal(flat(moe.tensor({ 2, 0 }):one_hot(3)), "0,0,1,1,0,0")
  raises("shape", function() return t:gather(1, moe.tensor { { 3 }, { 0 } }) end, "[2, 3]")
  raises("dtype", function() return t:gather(1, moe.tensor { { 0.5 }, { 0 } }) end)
  raises("shape", function() return t:index_select(0, moe.tensor { 2 }) end)
  raises("shape", function() return moe.tensor({ 3 }):one_hot(3) end, "0 … 2")
  raises("shape", function() return moe.tensor({ -1 }):bincount() end)
  raises("dtype", function() return t:masked_fill(t, 0) end, "int64")
end)

test("ops: shapes", function()
  local t = moe.arange(6):reshape { 2, 3 }
  equal(flat(t:flip(1)), "2,1,0,5,4,3")
  equal(flat(t:roll(1, 1)), "2,0,1,5,3,4")
  equal(flat(t:permute { 1, 0 }), "0,3,1,4,2,5")
  equal(shape(t:unsqueeze(-1)), "[2, 3, 1]")
  equal(shape(t:unsqueeze(1):squeeze(1)), "[2, 3]")
  equal(shape(t:unsqueeze(0):expand { 4, -1, -1 }), "[4, 2, 3]")
  equal(flat(moe.arange(2):tile { 2, 2 }), "0,1,0,1,0,1,0,1")
  equal(flat(moe.arange(2):repeat_interleave(2)), "0,0,1,1")
  equal(shape(moe.zeros({ 2, 3, 4 }):flatten(1)), "[2, 12]")
  local parts = t:split(2, 1)
  equal(#parts, 2)
  equal(flat(parts[2]), "2,5")
  equal(#t:split({ 1, 2 }, 1), 2)
  equal(flat(t:chunk(3, 1)[3]), "2,5")
  equal(flat(t:unbind(1)[1]), "0,3")
  equal(flat(moe.ones({ 3, 3 }):tril(-1):long()), "0,0,0,1,0,0,1,1,0")
  equal(flat(moe.ones({ 2, 2 }):triu():long()), "1,1,0,1")
  equal(flat(t["…, :2"]:diag()), "0,4")
  equal(flat(moe.arange(2):outer(moe.arange(3))), "0,0,0,0,1,2")
  equal(flat(moe.einsum("ij,kj->ik", t, t)), "5,14,14,50")
  raises("shape", function() return t:permute { 0 } end, "[2, 3]")
  raises("shape", function() return t:expand { 4, 3 } end)
  raises("shape", function() return t:split({ 1, 1 }, 1) end)
  raises("usage", function() return t:chunk(0) end)
  raises("shape", function() return t:outer(t) end, "two vectors")
end)

test("ops: made by number", function()
  equal(flat(moe.linspace(0, 1, 3, fp64)), "0.0,0.5,1.0")
  equal(flat(moe.eye(2, { dtype = "int64" })), "1,0,0,1")
  equal(shape(moe.eye(2, 3)), "[2, 3]")
  equal(moe.full_like(moe.arange(3), 7):sum():item(), 21)
  equal(moe.ones_like(moe.arange(3), { dtype = "bf16" }).dtype, "bfloat16")
  equal(moe.full({ 2 }, true).dtype, "bool")
  equal(moe.zeros({ 2 }, { requires_grad = true }).requires_grad, true)
  equal(moe.arange(5, 0, -2):sum():item(), 9)
  raises("usage", function() return moe.linspace(0, 1, -1) end)
end)

test("ops: in place, and t is given back", function()
  local t = moe.ones({ 3 }, fp64)
  is(t:add_(2) == t)
  t:mul_(moe.tensor { 1, 2, 3 }):sub_(1):div_(2)
  same(t, { 1, 2.5, 4 })
  same(t:add_(1, { alpha = -1 }), { 0, 1.5, 3 })
  same(t:clamp_(1, 2), { 1, 1.5, 2 })
  same(t:fill_(4), { 4, 4, 4 })
  is(not t:zero_():any())
  raises("shape", function() return t:add_(moe.ones { 2, 3 }) end, "[2, 3] into [3]")
  raises("usage", function() return moe.arange(3):add_(0.5) end)
end)

test("ops: conversions", function()
  local t = moe.tensor { 1.75, -2.5 }
  equal(t:long().dtype, "int64")
  equal(t:double().dtype, "float64")
  equal(t:half().dtype, "float16")
  equal(t:bfloat16().dtype, "bfloat16")
  equal(flat(t:int()), "1,-2")
  equal(t:bool():all(), true)
  equal(t:cpu().device, "cpu")
  equal(t:to(moe.zeros({ 1 }, fp64)).dtype, "float64")
  equal(t:to("bf16", "cpu").dtype, "bfloat16")
  if not moe.cuda.available() then raises("device", function() return t:cuda() end, "cuda") end
end)

test("ops: generators repeat, differ and hold their state", function()
  local g = moe.generator(3)
  local a, state = moe.randn({ 5 }, { generator = g }), g:state()
  local b = moe.randn({ 5 }, { generator = g })
  is(not a:eq(b):all())
  is(moe.randn({ 5 }, { generator = g:set_state(state) }):eq(b):all())
  is(moe.randn({ 5 }, { generator = g:seed(3) }):eq(a):all())
  moe.seed(5)
  local first = moe.rand { 4 }
  moe.rand({ 4 }, { generator = g })
  moe.seed(5)
  is(moe.rand({ 4 }):eq(first):all(), "a generator draws beside the default one")
  equal(tostring(g), "generator: seed 3, cpu")
  equal(flat((moe.randperm(6):sort())), "0,1,2,3,4,5")
  local ids = moe.tensor({ 0.0, 1.0, 3.0 }):multinomial(2000, { replacement = true, generator = g })
  local counts = ids:bincount(3)
  equal(counts[0]:item(), 0)
  near(counts[2]:item() / 2000, 0.75, 0.05)
  near(moe.zeros({ 4000 }):normal_(2, 3, { generator = g }):std():item(), 3, 0.2)
  is(moe.zeros({ 100 }):uniform_(1, 2):amin():item() >= 1)
  near(moe.full({ 2000 }, 0.25):bernoulli({ generator = g }):mean():item(), 0.25, 0.05)
  raises("usage", function() return moe.tensor({ 1.0, 1.0 }):multinomial(3) end, "3 of 2")
  raises("usage", function() return moe.tensor({ -1.0, 1.0 }):multinomial(1) end, "negative")
  raises("usage", function() return moe.randn({ 2 }, { generator = 3 }) end, "a generator")
  raises("usage", function() return moe.tensor({ 1.5 }):bernoulli() end)
end)

test("ops: errors carry the operation and the shapes", function()
  local err = raises("shape", function() return moe.cat { moe.ones { 2, 3 }, moe.ones { 4, 5 } } end, "moe.cat", "got float32 [2, 3] cpu, float32 [4, 5] cpu")
  err = raises("shape", function() return moe.ones({ 2, 3 }):index_add(0, moe.tensor { 0 }, moe.ones { 4, 5 }) end, "tensor:index_add", "float32 [2, 3] cpu", "[4, 5]")
  is(err.where:find("tensors_ops.lua:%d+"))
  raises("shape", function() return moe.ones({ 3, 2 }):matmul(moe.ones { 3, 2 }) end, "[3, 2]")
end)

test("ops: failing calls in a row", function()
  local t, failed = moe.ones { 3 }, 0
  for _ = 1, 20000 do
    if not pcall(t.sum, t, 5) then failed = failed + 1 end
  end
  equal(failed, 20000)
end)

test("ops: temporaries of 1 MB in bounded memory", function()
  local function resident()
    local file = io.open("/proc/self/statm")
    local pages = file:read("a"):match("^%d+ (%d+)")
    file:close()
    return pages * 4096 / 2 ^ 20
  end
  local slow = arg.options.slow
  local a, before, most = moe.ones { 2 ^ 18 }, resident(), 0
  for i = 1, slow and 10 ^ 6 or 1500 do
    local _ = a + i
    if i % 100 == 0 then most = math.max(most, resident() - before) end
  end
  is(most < 200, ("grew by %.0f MiB"):format(most))
end)

test("ops: results that take the memory of tensors let go disturb nothing that is still held", function()
  local a, b = moe.tensor { 1.0, 2.0, 3.0, 4.0 }, moe.tensor { 10.0, 20.0, 30.0, 40.0 }
  local function leave() for _ = 1, 300 do local _ = a - b end collectgarbage() end
  leave()
  local views, results, weight = {}, {}, moe.tensor({ 5.0, 5.0, 5.0, 5.0 }, { requires_grad = true })
  for i = 1, 300 do
    local sum = a * b + b
    views[i] = sum:narrow(0, 1, 2)          -- outlives the tensor whose memory it shows
    results[i] = a / b - a
  end
  local loss = (weight * (a + b)):sum()     -- the product keeps a + b for the backward pass
  leave()
  local overwritten = {}
  for i = 1, 300 do overwritten[i] = (a + a) * b end
  for i = 1, 300 do
    is(views[i]:allclose(moe.tensor { 2 * 20 + 20.0, 3 * 30 + 30.0 }), i)
    near(results[i]:sum():item(), 4 * 0.1 - 10, 1e-5)
    is(overwritten[i]:allclose(moe.tensor { 20.0, 80.0, 180.0, 320.0 }), i)
  end
  loss:backward()
  is(weight.grad:allclose(moe.tensor { 11.0, 22.0, 33.0, 44.0 }))
  local once = moe.tensor({ 1.0, 1.0, 1.0, 1.0 }, { requires_grad = true })
  ;(once * a):sum():backward()
  once.requires_grad = false
  once = nil
  leave()
  for _ = 1, 300 do is((a + b).grad == nil) end      -- nor a gradient of another
  local d, e = a:to("fp64"), moe.tensor { { 1.0, 2.0 }, { 3.0, 4.0 } }
  for _ = 1, 3 do
    leave()
    equal((d + d).dtype, "float64")
    equal((a:to("int64") + b:to("int64")).dtype, "int64")
    is((e * e):allclose(moe.tensor { { 1.0, 4.0 }, { 9.0, 16.0 } }))
  end
end)

test("ops: sums, differences, products and quotients of small tensors are bit for bit those of the same numbers in a large one", function()
  local function bits(t)
    local list = t:to("fp64"):to_table()
    for i, x in ipairs(list) do list[i] = x ~= x and "nan" or ("%a"):format(x) end
    return list
  end
  local generator = moe.generator(5)
  for _, dtype in ipairs { "fp32", "fp64", "bf16" } do
    local special = moe.tensor { 0.0, -0.0, 1 / 0, -1 / 0, 0 / 0, 1e-45, -1e-40, 3e38, 1.0, -3.0 }
    local a = moe.cat({ special:repeat_interleave(10), moe.randn({ 500 }, { generator = generator }) }, 0):to(dtype)
    local b = moe.cat({ special:reshape { 1, 10 }:expand { 10, 10 }:reshape { 100 }, moe.randn({ 500 }, { generator = generator }) }, 0):to(dtype)
    for name, f in pairs { plus = function(x, y) return x + y end, minus = function(x, y) return x - y end, times = function(x, y) return x * y end, over = function(x, y) return x / y end } do
      local large = bits(f(a, b))
      for round = 1, 2 do                       -- the second over tensors that the first let go
        for i = 0, 99 do
          local small = bits(f(a:narrow(0, 6 * i, 6):clone(), b:narrow(0, 6 * i, 6):clone()))
          for j = 1, 6 do equal(small[j], large[6 * i + j], dtype .. " " .. name .. " " .. 6 * i + j) end
        end
        collectgarbage()
      end
    end
  end
end)

test("ops: small temporaries do not pile up beside Lua's memory", function()
  local a = moe.ones { 2 }
  collectgarbage()
  local before = collectgarbage("count")
  for _ = 1, 50000 do local _ = a + 1 end
  is(collectgarbage("count") - before < 8000, ("grew by %.0f KiB"):format(collectgarbage("count") - before))
end)

check.done()

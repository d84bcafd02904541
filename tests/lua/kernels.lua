-- moe.kernels: the texts, products, norms, activations, the head, dropout and quantisation against Lua's tensor operators, what wrong arguments give, and all ops on a GPU.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/kernels.lua")
local test, equal, near, is, raises, randn, shape, close, same = check.test, check.equal, check.near, check.is, check.raises, check.randn, check.shape, check.close, check.same
local k = moe.kernels
local nan, inf = 0 / 0, math.huge
local fp64, int32, int64 = { dtype = "fp64" }, { dtype = "int32" }, { dtype = "int64" }

local function silu(x) return x * x:sigmoid() end

test("kernels: every op has a text with its shapes or meaning and an example", function()
  local names = {}
  for name, f in pairs(k) do
    names[#names + 1] = name
    local text = moe.help_text(f)
    check.contains(text, "moe.kernels." .. name .. "(")
    is(text:find("\n.*moe%.kernels%."), name .. " has no example")
  end
  is(#names >= 32, "only " .. #names)
end)

test("kernels: the texts' examples run", function()
  local plan = k.sort_by_expert(moe.tensor { { 1, 0 }, { 1, 2 } }, 3)
  local w = randn(2, 3, 4)
  local q, transposed, scale = k.quantize_weight(moe.randn { 128, 256 })
  local cache = { rows = k.make_cache_rows(1, 8, 4), block_table = moe.zeros({ 1, 1 }, int32), latent = 8, rope = 4 }
  local rows = k.permute(moe.randn { 2, 8 }, moe.ones { 2, 2 }, plan)
  local env = setmetatable({ plan = plan, w = w, g = randn(2, 3, 4), q = q, scale = scale, cache = cache, rows = rows, ids = moe.zeros({ 4, 2 }, int64), x = moe.ones { 2 } }, { __index = _G })
  for name, f in pairs(k) do
    local example = moe.help_text(f):gsub("\n  moe%.kernels%..*$", ""):match("([^\n]+)$")    -- before the list of its fields
    local ok, err = pcall(assert(load(example, name, "t", setmetatable({}, { __index = env }))))
    is(ok, name .. ": " .. tostring(err))
  end
end)

test("kernels: rmsnorm and layernorm", function()
  local x, gamma, beta = randn(5, 7), randn(7), randn(7)
  close(k.rmsnorm(x, gamma), x / ((x * x):mean(1, { keepdim = true }) + 1e-6):sqrt() * gamma)
  close(k.rmsnorm(x, gamma, { eps = 0.5 }), x / ((x * x):mean(1, { keepdim = true }) + 0.5):sqrt() * gamma)
  local d = x - x:mean(1, { keepdim = true })
  close(k.layernorm(x, gamma, beta, { eps = 0.25 }), d / ((d * d):mean(1, { keepdim = true }) + 0.25):sqrt() * gamma + beta)
  for _, dtype in ipairs { "fp32", "bf16", "fp16" } do equal(k.rmsnorm(x:to(dtype), gamma:to(dtype)).dtype, x:to(dtype).dtype) end
  equal(shape(k.rmsnorm(moe.zeros { 0, 7 }, moe.ones { 7 })), "[0, 7]")
end)

test("kernels: strided operands give what contiguous ones give", function()
  local x, wide = randn(7, 5).T, randn(3, 14)
  local gamma, w = randn(7, 2):select(1, 1), randn(7, 4).T
  same(k.rmsnorm(x, gamma), k.rmsnorm(x:contiguous(), gamma:contiguous()))
  same(k.linear(x, w), k.linear(x:contiguous(), w:contiguous()))
  same(k.swiglu(wide:narrow(1, 1, 6)), k.swiglu(wide:narrow(1, 1, 6):contiguous()))
  same(k.embed(moe.tensor { { 1, 3 }, { 0, 2 } }:select(1, 1), w), moe.stack { w[3], w[2] })
  local loss = k.head_loss(x, w, moe.tensor { 0, 1, 2, 3, 0 })
  near(loss:item(), k.head_loss(x:contiguous(), w:contiguous(), moe.tensor { 0, 1, 2, 3, 0 }):item(), 0)
end)

test("kernels: swiglu with and without row weights", function()
  local x, weight = randn(4, 10), randn(4)
  local y = silu(x:narrow(1, 0, 5)) * x:narrow(1, 5, 5)
  close(k.swiglu(x), y)
  close(k.swiglu(x, weight), y * weight:reshape { 4, 1 })
  equal(shape(k.swiglu(moe.zeros { 0, 10 })), "[0, 5]")
end)

test("kernels: linear, linear_wide and linear_fp64", function()
  local x, w = randn(5, 7), randn(3, 7)
  close(k.linear(x, w), x:matmul(w.T))
  local narrow = x:to("bf16")
  local wide = k.linear_wide(narrow, w:to("fp32"))
  equal(wide.dtype, "float32")
  close(wide, narrow:to("fp64"):matmul(w:to("fp32"):to("fp64").T), 1e-5)
  local exact = k.linear_fp64(narrow, w:to("bf16"))
  equal(exact.dtype, "float64")
  close(exact, narrow:to("fp64"):matmul(w:to("bf16"):to("fp64").T))
  equal(shape(k.linear(moe.zeros { 0, 7 }, moe.zeros { 3, 7 })), "[0, 3]")
end)

test("kernels: linear in fp8 is the product of the E4M3 numbers", function()
  local x, w = randn(5, 144):to("bf16"), randn(16, 144):to("bf16")
  local qx, sx = k.quantize_rows(x)
  local qw, _, sw = k.quantize_weight(w)
  close(k.linear(x, w, { fp8 = true }), k.dequantize_rows(qx, sx):to("fp64"):matmul(k.dequantize_weight(qw, sw)[0]:to("fp64").T), 0.1)
  raises("dtype", function() return k.linear(randn(2, 4), randn(3, 4), { fp8 = true }) end, "bfloat16")
end)

test("kernels: grouped_linear by offsets and by plan, one expert with all rows, one with none", function()
  local x, w = randn(6, 4), randn(3, 5, 4)
  local function by_loop(offsets)
    local parts = {}
    for e = 0, 2 do parts[#parts + 1] = x:narrow(0, offsets[e + 1], offsets[e + 2] - offsets[e + 1]):matmul(w[e].T) end
    return moe.cat(parts)
  end
  for _, offsets in ipairs { { 0, 2, 5, 6 }, { 0, 0, 6, 6 }, { 0, 6, 6, 6 } } do close(k.grouped_linear(x, moe.tensor(offsets), w), by_loop(offsets)) end
  equal(shape(k.grouped_linear(randn(0, 4), moe.zeros({ 4 }, int64), w)), "[0, 5]")
  local plan = k.sort_by_expert(moe.tensor { { 0 }, { 2 }, { 2 }, { 0 }, { 2 }, { 2 } }, 3)
  same(k.grouped_linear(x, plan, w), k.grouped_linear(x, plan.offsets, w))
  equal(k.grouped_alignment(x), 1)
  raises("shape", function() return k.grouped_linear(x, moe.tensor { 0, 2, 5 }, w) end, "[3]", "[4]")
  raises("shape", function() return k.grouped_linear(x, moe.tensor { 0, 5, 2, 6 }, w) end, "offsets[2]")
  raises("shape", function() return k.grouped_linear(x, moe.tensor { 0, 2, 5, 7 }, w) end, "0 … 7")
  raises("dtype", function() return k.grouped_linear(x, moe.zeros({ 4 }, int32), w) end, "int64")
  raises("usage", function() return k.grouped_linear(x, plan, w, { align = 2 }) end, "align")
  raises("shape", function() return k.grouped_linear(x, moe.tensor { 0, 2, 5, 6 }, w, { align = 2 }) end, "multiple of 2")
end)

test("kernels: embed", function()
  local w = randn(5, 3)
  same(k.embed(moe.tensor { 4, 0, 4 }, w), moe.stack { w[4], w[0], w[4] })
  equal(shape(k.embed(moe.zeros({ 0 }, int64), w)), "[0, 3]")
  raises("data", function() return k.embed(moe.tensor { 5 }, w) end, "ids[0]", "[0, 5)")
  raises("dtype", function() return k.embed(moe.zeros({ 1 }, int32), w) end)
end)

test("kernels: head_loss with ignored targets, in chunks", function()
  local x, w, targets = randn(5, 4), randn(7, 4), { 6, -100, 0, 3, 3 }
  local p, sum = x:matmul(w.T):softmax(1), 0
  local want = {}
  for t, id in ipairs(targets) do want[t] = id >= 0 and -math.log(p[t - 1][id]:item()) or 0.0 end
  for _, l in ipairs(want) do sum = sum + l end
  for _, chunk in ipairs { 0, 1, 2, 9 } do
    local loss, by_token = k.head_loss(x, w, moe.tensor(targets), { scale = 0.25, chunk = chunk })
    equal(loss.dtype, "float64")
    near(loss:item(), sum / 4, 1e-12)
    close(by_token, moe.tensor(want), 1e-6)
  end
  equal(k.head_loss(randn(0, 4), w, moe.zeros({ 0 }, int64)):item(), 0.0)
  raises("data", function() return k.head_loss(x, w, moe.full({ 5 }, 7)) end, "targets[0]")
  raises("shape", function() return k.head_loss(x, w, moe.tensor { 1 }) end)
  raises("usage", function() return k.head_loss(x, w, moe.tensor(targets), { chunk = -1 }) end)
end)

test("kernels: quantized rows and weights are within half a step of E4M3, NaN stays in its block", function()
  local x = moe.randn { 5, 200 }
  x[3] = x[3] * 1e-3
  local q, scale = k.quantize_rows(x)
  equal(q.dtype, "float8_e4m3fn")
  equal(shape(scale), "[2, 8]")
  equal(scale[0][7]:item(), 0.0)
  local back = k.dequantize_rows(q, scale)
  for r = 0, 4 do
    for block = 0, 1 do
      local part = x[r]:narrow(0, block * 128, block == 0 and 128 or 72)
      local top = part:abs():max():item()
      near(scale[block][r]:item(), top / 448, top * 1e-6)
      is((back[r]:narrow(0, block * 128, block == 0 and 128 or 72) - part):abs():max():item() <= top / 448 * 16, "further than half a step of the largest")
    end
  end
  local w = moe.randn { 2, 130, 140 }
  local qw, transposed, sw = k.quantize_weight(w)
  equal(shape(sw), "[2, 2, 2]")
  same(qw:to("fp32"):transpose(1, 2):contiguous(), transposed:to("fp32"))
  near(sw[1][0][0]:item(), w[1]:narrow(0, 0, 128):narrow(1, 0, 128):abs():max():item() / 448, 1e-6)
  is((k.dequantize_weight(qw, sw) - w):abs():max():item() <= w:abs():max():item() / 448 * 16)
  x[1] = nan
  back = k.dequantize_rows(k.quantize_rows(x))
  is(not back[1]:is_finite() and back[0]:is_finite() and back[2]:is_finite())
  equal(shape(k.dequantize_rows(k.quantize_rows(moe.zeros { 0, 256 }))), "[0, 256]")
  raises("dtype", function() return k.quantize_rows(x:to("fp64")) end, "float64")
  raises("shape", function() return k.quantize_weight(moe.zeros { 3 }) end)
  raises("dtype", function() return k.dequantize_rows(x, scale) end, "float8_e4m3fn")
  raises("shape", function() return k.dequantize_rows(q, scale.T) end, "[2, 8]")
end)

test("kernels: dropout, its mask and normal draws by key", function()
  local x = randn(40, 50)
  local key = { seed = 5, step = 2, layer = 1, purpose = "expert_dropout", dtype = "fp64" }
  local mask = k.dropout_mask(40, 50, 0.25, key)
  key.dtype = nil
  close(k.dropout(x, 0.25, key), x * mask)
  local zeros = mask:eq(0):to("fp64"):sum():item()
  is(zeros > 400 and zeros < 600, zeros .. " of 2000")
  near(mask:max():item(), 4 / 3, 1e-12)
  key.dtype, key.first = "fp64", 10
  same(k.dropout_mask(30, 50, 0.25, key), mask:narrow(0, 10, 30):contiguous())
  key.step = 3
  is(k.dropout_mask(30, 50, 0.25, key):eq(mask:narrow(0, 10, 30)):to("fp32"):mean():item() < 0.9)
  local same_numbers = k.dropout(x, 0)
  same_numbers[0] = 0
  is(x[0]:abs():sum():item() > 0, "dropout of nothing is a copy")
  local n = k.normal_rows(100, 100, { seed = 1, dtype = "fp64" })
  near(n:mean():item(), 0, 0.05)
  near((n * n):mean():item(), 1, 0.05)
  raises("usage", function() return k.dropout(x, 1) end, "below 1")
  raises("usage", function() return k.dropout(x, nan) end)
  raises("usage", function() return k.dropout(x, 0.5, { group = 0 }) end, "at least 1")
  raises("usage", function() return k.dropout(x, 0.5, { step = -1 }) end)
  raises("usage", function() return k.dropout(x, 0.5, { purpose = "expert_drop" }) end, "expert_dropout")
  raises("shape", function() return k.dropout_mask(-1, 2, 0.5) end)
  raises("dtype", function() return k.normal_rows(2, 2, { dtype = "int64" }) end)
end)

test("kernels: wrong types, shapes, dtypes and names give one error each; NaN and infinities are kept", function()
  local x, w = randn(4, 6), randn(6)
  raises("usage", function() return k.rmsnorm(x, 1) end, "gamma", "a tensor")
  raises("usage", function() return k.rmsnorm(x, w, { epsilon = 1 }) end, "epsilon", "eps")
  raises("usage", function() return k.rmsnorm(x, w, 1e-6) end, "options")
  raises("shape", function() return k.rmsnorm(x, randn(5)) end, "[5]", "[6]")
  raises("shape", function() return k.rmsnorm(w, w) end)
  raises("dtype", function() return k.rmsnorm(x, w:to("fp32")) end)
  raises("dtype", function() return k.rmsnorm(moe.zeros({ 4, 6 }, int64), moe.zeros({ 6 }, int64)) end, "int64")
  raises("shape", function() return k.layernorm(x, w, randn(5)) end)
  raises("shape", function() return k.swiglu(randn(4, 5)) end, "even")
  raises("shape", function() return k.swiglu(x, randn(3)) end)
  raises("shape", function() return k.linear(x, randn(3, 5)) end, "[4, 6]", "[3, 5]")
  raises("dtype", function() return k.linear(x, randn(3, 6):to("fp32")) end)
  raises("dtype", function() return k.linear_wide(x, randn(3, 6):to("bf16")) end)
  local freed = randn(2)
  freed:free()
  raises("state", function() return k.sum_of_squares(freed) end)
  for _, bad in ipairs { nan, inf } do
    local y = x:clone()
    y[1][2] = bad
    local function kept(t) is(not t[1]:is_finite() and t[0]:is_finite() and t[2]:is_finite(), "row 1 alone is not finite") end
    kept(k.rmsnorm(y, moe.ones({ 6 }, fp64)))
    kept(k.layernorm(y, moe.ones({ 6 }, fp64), w))
    kept(k.swiglu(y))
    kept(k.linear(y, randn(3, 6)))
    kept(k.permute(y, randn(4, 1), k.sort_by_expert(moe.zeros({ 4, 1 }, int64), 1)))
    local _, by_token = k.head_loss(y, moe.ones({ 5, 6 }, fp64), moe.zeros({ 4 }, int64))
    kept(by_token)
  end
end)

local on_gpu = "kernels: on a GPU the same calls give the CPU's numbers"
if pcall(moe.zeros, { 1 }, { device = "cuda" }) then
  test(on_gpu, function()
    -- Two runs of the same calls with the same numbers; f moves a tensor to the run's device.
    local function results(f)
      local x, gamma, ids = f(moe.arange(60):to("fp32"):reshape { 6, 10 } * 0.01 - 0.3), f(moe.ones { 10 } * 0.5), f(moe.tensor { { 0, 2 }, { 1, 2 }, { 2, -1 }, { 0, 1 }, { 2, 0 }, { 1, 0 } })
      local w, experts = f(moe.arange(70):to("fp32"):reshape { 7, 10 } * 0.02 - 0.7), f((moe.arange(240) % 13):to("fp32"):reshape { 3, 8, 10 } * 0.1)
      local plan = k.sort_by_expert(ids, 3, { align = k.grouped_alignment(x) })
      local rows, row_weight = k.permute(x, f(moe.ones { 6, 2 } * 0.25), plan)
      local cos, sin = k.rope_table(6, 2)
      local m, v, p = f(moe.zeros { 6, 10 }), f(moe.zeros { 6, 10 }), x:clone()
      local cache = { rows = f(k.make_cache_rows(1, 8, 2)), block_table = f(moe.zeros({ 1, 1 }, int32)), latent = 8, rope = 2 }
      k.append_latent(cache, x:narrow(1, 0, 8), x:narrow(1, 8, 2), f(moe.zeros({ 6 }, int32)), f(moe.arange(6):to("int32")))
      local scores, weights, chosen = k.route(k.linear_wide(x, w:narrow(0, 0, 6)), nil, { top_k = 2, n_group = 3, topk_group = 2 })
      local loss, by_token = k.head_loss(x, w, f(moe.tensor { 0, 6, -100, 3, 2, 1 }))
      local out, lse = k.mla_decode(x:narrow(1, 0, 8):reshape { 1, 1, 6, 8 }, x:narrow(1, 8, 2):reshape { 1, 1, 6, 2 }, cache, f(moe.tensor({ 6 }, int32)), 0.3)
      return {
        rmsnorm = k.rmsnorm(x, gamma), layernorm = k.layernorm(x, gamma, gamma), swiglu = k.swiglu(x), linear = k.linear(x, w), linear_fp64 = k.linear_fp64(x, w),
        embed = k.embed(f(moe.tensor { 6, 0 }), w), rows = k.unpermute(x, rows, plan), grouped = k.unpermute(nil, k.grouped_linear(rows, plan, experts), plan), scores = scores, weights = weights,
        chosen = chosen, loss = loss, by_token = by_token, squares = k.sum_of_squares(x), orthogonal = k.newton_schulz(x:reshape { 1, 6, 10 }), dropout = k.dropout(x, 0.3, { seed = 3 }),
        attention = k.mla_attention(x, x:narrow(1, 0, 8), { H = 2, nope = 3, rope = 2, v = 5, G = 1, k_rope = x:narrow(1, 8, 2), cos = cos, sin = sin }),
        adamw = k.adamw(p, x, m, v, { lr = 0.1 }), moment = m, out = out, lse = lse, cache = cache.rows,
        counts = k.count_pairs(chosen, f(moe.zeros({ 6 }, int32)), f(moe.zeros({ 2, 6 }, int64))),
        quantized = k.dequantize_rows(k.quantize_rows(w:reshape { 1, 70 }:narrow(1, 0, 64))),
      }
    end
    local want, got = results(function(t) return t end), results(function(t) return t:to("cuda") end)
    for name, t in pairs(got) do
      check.contains(t.device, "cuda")
      close(t:to("cpu"), want[name], 1e-4, name)
    end
    raises("device", function() return k.rmsnorm(moe.zeros { 2, 4 }, moe.ones({ 4 }, { device = "cuda" })) end)
    raises("device", function() return k.linear(moe.zeros({ 2, 4 }, { device = "cuda" }), moe.ones { 3, 4 }) end)
  end)
else
  print("ok " .. on_gpu .. " # skip no GPU")
end

check.done()

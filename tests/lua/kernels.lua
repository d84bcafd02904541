-- moe.kernels: every op against Lua's tensor operators or plain loops over tables, and what wrong arguments give.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises
local k = moe.kernels
local nan, inf = 0 / 0, math.huge
local fp64, int32, int64 = { dtype = "fp64" }, { dtype = "int32" }, { dtype = "int64" }
moe.seed(11)

local function randn(...) return moe.randn({ ... }, fp64) end
local function shape(t) return tostring(t.shape) end
-- nan and inf first, then the largest error.
local function close(got, want, tolerance, what)
  equal(shape(got), shape(want), what)
  is(got:is_finite(), (what or "") .. " not finite")
  if got:numel() == 0 then return end
  local error = (got:to("fp64") - want:to("fp64")):abs():max():item()
  is(error <= (tolerance or 1e-12), ("%s differs by %g"):format(what or "result", error))
end
local function silu(x) return x * x:sigmoid() end
local function same(got, want) is(got.dtype == want.dtype and shape(got) == shape(want) and got:eq(want):to("fp32"):sum():item() == want:numel(), "not the same numbers") end

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

test("kernels: route with groups equals a plain loop, and its bias moves the choice only", function()
  local T, E, K, G, keep = 9, 8, 2, 4, 2
  local logits, bias = randn(T, E), randn(E)
  local scores, weights, ids = k.route(logits, bias, { top_k = K, n_group = G, topk_group = keep, scale = 2.5, temperature = 0.5 })
  close(scores, (logits / 0.5):sigmoid())
  local s, b = scores:to_table(), bias:to_table()
  for t = 1, T do
    local groups = {}
    for g = 1, G do groups[g] = { g = g, best = s[t][2 * g - 1] + b[2 * g - 1] + s[t][2 * g] + b[2 * g] } end
    table.sort(groups, function(x, y) return x.best > y.best end)
    local experts = {}
    for i = 1, keep do for e = 2 * groups[i].g - 1, 2 * groups[i].g do experts[#experts + 1] = e end end
    table.sort(experts, function(x, y) return s[t][x] + b[x] > s[t][y] + b[y] end)
    local sum = s[t][experts[1]] + s[t][experts[2]]
    for i = 1, K do
      equal(ids[t - 1][i - 1]:item(), experts[i] - 1)
      near(weights[t - 1][i - 1]:item(), 2.5 * s[t][experts[i]] / sum, 1e-12)
    end
  end
  local soft, raw, given = k.route(logits, nil, { top_k = 1, softmax = true, norm_topk = false, ids = moe.full({ T, 1 }, 3) })
  close(soft, logits:softmax(1))
  same(raw:reshape { T }, soft:select(1, 3))
  equal(given:sum():item(), 3 * T)
  equal(shape((k.route(moe.zeros { 0, 4 }))), "[0, 4]")
end)

test("kernels: route refuses what does not fit, NaN is chosen and reaches the weights", function()
  local logits = randn(3, 8)
  raises("usage", function() return k.route(logits, nil, { top_k = 5, n_group = 4, topk_group = 2 }) end, "top_k", "at most the 4 experts of 2 groups")
  raises("usage", function() return k.route(logits, nil, { n_group = 3 }) end, "a divisor of 8")
  raises("usage", function() return k.route(logits, nil, { topk = 2 }) end, "topk", "top_k")
  raises("usage", function() return k.route(logits, nil, { temperature = 0 }) end)
  raises("dtype", function() return k.route(logits:to("bf16")) end, "bfloat16")
  raises("shape", function() return k.route(logits, randn(7)) end, "[7]", "[8]")
  raises("shape", function() return k.route(logits, nil, { ids = moe.full({ 3, 1 }, 8) }) end, "ids[0][0]", "[0, 8)")
  raises("shape", function() return k.route(logits, nil, { ids = moe.full({ 3, 2 }, 1) }) end)
  logits[1] = moe.tensor { 0, 0, 0, 0, 0, nan, 0, 0 }
  local _, weights, ids = k.route(logits, nil, { top_k = 2 })
  equal(ids[1][0]:item(), 5)
  is(weights[1][0]:item() ~= weights[1][0]:item() and weights[0]:is_finite() and weights[2]:is_finite())
end)

test("kernels: count_pairs by domain, padding apart, drops", function()
  local ids, kept = moe.tensor { { 0, 2 }, { 2, 1 }, { 2, 0 } }, moe.tensor { { 0, -1 }, { -1, 1 }, { -1, 0 } }
  local counts, dropped = moe.zeros({ 3, 3 }, int64), moe.zeros({ 3 }, int64)
  is(k.count_pairs(ids, moe.tensor({ 0, 1, -1 }, int32), counts, { kept = kept, dropped = dropped }) == counts, "counts is returned")
  same(counts, moe.tensor { { 1, 0, 1 }, { 1, 0, 1 }, { 0, 1, 1 } })
  same(dropped, moe.tensor { 0, 0, 2 })
  raises("shape", function() return k.count_pairs(ids, moe.tensor({ 0, 1, 2 }, int32), counts) end, "domain 2")
  raises("shape", function() return k.count_pairs(ids, moe.zeros({ 3 }, int32), counts, { kept = kept }) end, "dropped")
end)

test("kernels: sort_by_expert, permute and unpermute against loops, dropped pairs and padding included", function()
  local list = { { 1, 0 }, { 2, 1 }, { -1, 1 } }
  local x, weights, base = randn(3, 4), randn(3, 2), randn(3, 4)
  for _, align in ipairs { 1, 4 } do
    local plan = k.sort_by_expert(moe.tensor(list), 4, { align = align })
    local token, row, offsets = {}, {}, { 0 }
    for e = 0, 3 do
      for t = 1, 3 do
        for c = 1, 2 do
          if list[t][c] == e then
            token[#token + 1], row[#row + 1] = t - 1, { t, c }
          end
        end
      end
      while #token % align > 0 do token[#token + 1], row[#row + 1] = -1, false end
      offsets[#offsets + 1] = #token
    end
    equal(plan.rows, #token)
    equal(plan.align, align)
    same(plan.offsets, moe.tensor(offsets))
    same(plan.token, moe.tensor(token, int32))
    equal(plan.position[2][0]:item(), -1)
    local rows, row_weight = k.permute(x, weights, plan)
    local sum = base:clone()
    for r, from in ipairs(row) do
      same(rows[r - 1], from and x[from[1] - 1] or moe.zeros({ 4 }, fp64))
      equal(row_weight[r - 1]:item(), from and weights[from[1] - 1][from[2] - 1]:item() or 0.0)
      if from then sum[from[1] - 1] = sum[from[1] - 1] + rows[r - 1] end
    end
    close(k.unpermute(base, rows, plan), sum)
    close(k.unpermute(nil, rows, plan), sum - base)
  end
end)

test("kernels: a plan for no tokens, for one expert that takes all, and for nothing but drops; it cannot be changed from outside", function()
  local none = k.sort_by_expert(moe.zeros({ 0, 2 }, int64), 3)
  equal(none.rows, 0)
  equal(shape(k.permute(randn(0, 4), randn(0, 2), none)), "[0, 4]")
  local all = k.sort_by_expert(moe.full({ 5, 1 }, 2), 3)
  same(all.offsets, moe.tensor { 0, 0, 0, 5 })
  local dropped = k.sort_by_expert(moe.full({ 2, 2 }, -1), 3)
  equal(dropped.rows, 0)
  equal(k.unpermute(nil, randn(0, 4), dropped):abs():sum():item(), 0.0)
  local token = all.token
  token[0] = 99
  equal(all.token[0]:item(), 0)
  check.contains(tostring(all), "5 tokens x 1 choices")
  raises("usage", function() return all.tokens end, "token")
  raises("usage", function() return k.permute(randn(5, 4), randn(5, 1), { token = token }) end, "sort plan")
  raises("shape", function() return k.sort_by_expert(moe.full({ 1, 1 }, 3), 3) end, "ids[0][0]")
  raises("shape", function() return k.permute(randn(4, 4), randn(5, 1), all) end, "[4, 4]")
  raises("shape", function() return k.unpermute(nil, randn(4, 4), all) end)
  raises("dtype", function() return k.permute(randn(5, 4), moe.zeros({ 5, 1 }, { dtype = "bf16" }), all) end)
  raises("usage", function() return k.sort_by_expert(moe.full({ 5, 1 }, 2), 3, { align = 0 }) end)
  raises("usage", function() return k.sort_by_expert(moe.full({ 5, 1 }, 2), 3, { align = 1 << 62 }) end)
  all:free()
  raises("state", function() return k.permute(randn(5, 4), randn(5, 1), all) end, "freed")
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

test("kernels: adamw, Adam and a bf16 copy against a plain loop", function()
  for _, decoupled in ipairs { true, false } do
    local w, m, v, value = randn(7), moe.zeros({ 7 }, fp64), moe.zeros({ 7 }, fp64), moe.zeros({ 7 }, { dtype = "bf16" })
    local want, first, second = w:to_table(), {}, {}
    for i = 1, 7 do first[i], second[i] = 0, 0 end
    for step = 1, 2 do
      local grad = randn(7)
      local g = grad:to_table()
      is(k.adamw(w, grad, m, v, { lr = 0.1, beta1 = 0.8, eps = 1e-3, weight_decay = 0.2, grad_scale = 0.5, step = step, decoupled = decoupled, value = value }) == w)
      for i = 1, 7 do
        local d = 0.5 * g[i] + (decoupled and 0 or 0.2 * want[i])
        first[i], second[i] = 0.8 * first[i] + 0.2 * d, 0.95 * second[i] + 0.05 * d * d
        want[i] = want[i] * (decoupled and 1 - 0.1 * 0.2 or 1) - 0.1 * (first[i] / (1 - 0.8 ^ step)) / ((second[i] / (1 - 0.95 ^ step)) ^ 0.5 + 1e-3)
      end
    end
    close(w, moe.tensor(want, fp64), 1e-12)
    close(m, moe.tensor(first, fp64), 1e-12)
    close(value, w, 0.02)
  end
end)

test("kernels: sgd with momentum, and a master in int16 rests", function()
  local w, buffer = randn(6), moe.zeros({ 6 }, fp64)
  local want, b = w:clone(), buffer:clone()
  for _ = 1, 3 do
    local g = randn(6)
    k.sgd(w, g, buffer, { lr = 0.1, momentum = 0.9, weight_decay = 0.01, grad_scale = 2 })
    b = b * 0.9 + (g * 2 + want * 0.01)
    want = want - b * 0.1
  end
  close(w, want)
  close(buffer, b)
  local value, rest = moe.ones({ 3 }, { dtype = "bf16" }), moe.zeros({ 3 }, { dtype = "int16" })
  k.sgd(rest, moe.ones { 3 }, nil, { lr = 2 ^ -10, value = value })
  same(value, moe.ones({ 3 }, { dtype = "bf16" }))
  k.sgd(rest, moe.ones { 3 }, nil, { lr = 1 - 2 ^ -10, value = value })
  close(value, moe.zeros({ 3 }), 0, "two steps that only the rests keep")
  raises("usage", function() return k.sgd(rest, moe.ones { 3 }, nil, { lr = 1 }) end, "value")
  raises("usage", function() return k.sgd(w, w, nil, { momentum = 0.5 }) end, "buffer")
end)

test("kernels: optimizers refuse other lengths, dtypes, strides and option names", function()
  local w, g = randn(6), randn(6)
  raises("shape", function() return k.adamw(w, randn(5), g, g) end, "5 elements", "6")
  raises("dtype", function() return k.adamw(w:to("fp16"), g, g, g) end, "float16")
  raises("dtype", function() return k.adamw(w, g:to("fp16"), g, g) end)
  raises("shape", function() return k.adamw(randn(6, 2):select(1, 0), g, g, g) end)
  raises("usage", function() return k.adamw(w, g, g, g, { step = 0 }) end, "at least 1")
  raises("usage", function() return k.adamw(w, g, g, g, { beta = 0.9 }) end, "beta1")
  raises("usage", function() return k.adamw(w, g, g) end, "v")
  raises("shape", function() return k.muon(w, g, g) end)
  raises("dtype", function() return k.muon(randn(1, 2, 3):to("bf16"), randn(1, 2, 3), randn(1, 2, 3)) end)
  raises("dtype", function() return k.newton_schulz(randn(1, 2, 3), { products = "int32" }) end)
  local before = w:to_table()
  k.adamw(w, moe.full({ 6 }, nan, fp64), moe.zeros({ 6 }, fp64), moe.zeros({ 6 }, fp64), { lr = 0.1 })
  is(not w:is_finite() and #before == 6, "a NaN in the gradient reaches the master")
  k.adamw(moe.zeros { 0 }, moe.zeros { 0 }, moe.zeros { 0 }, moe.zeros { 0 })
end)

test("kernels: newton_schulz and muon by products of matrices", function()
  local function orthogonal(g)
    local x = g / g:norm()
    for _ = 1, 5 do
      local a = x:matmul(x.T)
      x = x * 3.4445 + (a * -4.7750 + a:matmul(a) * 2.0315):matmul(x)
    end
    return x
  end
  local g = randn(2, 4, 6)
  local u = k.newton_schulz(g, { products = "fp64" })
  for n = 0, 1 do close(u[n], orthogonal(g[n]), 1e-10) end
  close(k.newton_schulz(g:transpose(1, 2), { products = "fp64" })[0], orthogonal(g[0]).T, 1e-10)
  local w, buffer = randn(2, 4, 6), randn(2, 4, 6)
  local want, b = {}, buffer * 0.95 + g * 0.5
  for n = 0, 1 do want[n + 1] = w[n] - (orthogonal(g[n] * 0.5 + b[n] * 0.95) * (0.2 * 6 ^ 0.5) + w[n] * 0.1) * 0.01 end
  k.muon(w, g, buffer, { lr = 0.01, weight_decay = 0.1, grad_scale = 0.5, products = "fp64" })
  close(w, moe.stack(want), 1e-10)
  close(buffer, b)
  equal(shape(k.newton_schulz(randn(0, 4, 6))), "[0, 4, 6]")
end)

test("kernels: sum_of_squares", function()
  local x = randn(20000)
  near(k.sum_of_squares(x):item(), (x * x):sum():item(), 1e-9)
  equal(k.sum_of_squares(moe.zeros { 0 }):item(), 0.0)
  is(k.sum_of_squares(moe.tensor { 1.0, inf }):item() == inf)
  raises("dtype", function() return k.sum_of_squares(moe.zeros({ 3 }, int64)) end)
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

-- Causal attention by loops over tables; see(b, i, j): whether position i sees j. Heads of q share key heads in order.
local function attention(q, kv, k_rope, s)
  local rot = function(x, first, position)
    local out = {}
    for d = 1, first do out[d] = x[d] end
    for i = 1, s.rope / 2 do
      local angle = position * 10000 ^ (-2 * (i - 1) / s.rope)
      local a, b = x[first + 2 * i - 1], x[first + 2 * i]
      out[first + 2 * i - 1], out[first + 2 * i] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    end
    return out
  end
  local Q, KV, R, out, W = q:to_table(), kv:to_table(), k_rope and k_rope:to_table(), {}, s.nope + s.rope
  for b = 0, s.B - 1 do
    for i = 0, s.S - 1 do
      local line = {}
      for h = 0, s.H - 1 do
        local g, query = h * s.G // s.H, rot({ table.unpack(Q[b * s.S + i + 1], h * W + 1, (h + 1) * W) }, s.nope, i)
        local weights, sum, part = {}, 0, {}
        for j = 0, i do
          if s.see(b, i, j) then
            local key = { table.unpack(KV[b * s.S + j + 1], g * (s.nope + s.v) + 1, g * (s.nope + s.v) + s.nope) }
            for d = 1, s.rope do key[s.nope + d] = R[b * s.S + j + 1][d] end
            key = rot(key, s.nope, j)
            local score = 0
            for d = 1, W do score = score + query[d] * key[d] end
            weights[j] = math.exp(score * s.scale)
            sum = sum + weights[j]
          end
        end
        for d = 1, s.v do
          part[d] = 0
          for j, w in pairs(weights) do part[d] = part[d] + w / sum * KV[b * s.S + j + 1][g * (s.nope + s.v) + s.nope + d] end
          line[#line + 1] = part[d]
        end
      end
      out[#out + 1] = line
    end
  end
  return moe.tensor(out, fp64)
end

test("kernels: mla_attention with and without rotation, documents, a window, shared key heads", function()
  local s = { B = 2, S = 6, H = 4, G = 2, nope = 3, rope = 4, v = 5, scale = 0.4, see = function() return true end }
  local q, kv, k_rope = randn(12, 4 * 7), randn(12, 2 * 8), randn(12, 4)
  local cos, sin = k.rope_table(8, 4)
  local o = { B = 2, H = 4, G = 2, nope = 3, rope = 4, v = 5, softmax_scale = 0.4, k_rope = k_rope, cos = cos, sin = sin }
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.p = 0.3
  local dropped = k.mla_attention(q, kv, o)
  is((dropped - k.mla_attention(q, kv, (function() o.p = nil return o end)())):abs():max():item() > 1e-3, "nothing was dropped")
  local starts = { { 0, 0, 2, 2, 2, 5 }, { 0, 1, 1, 1, 1, 1 } }
  o.doc_start, s.see = moe.tensor(starts, int32), function(b, i, j) return j >= starts[b + 1][i + 1] end
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.window, s.see = 2, function(b, i, j) return j >= starts[b + 1][i + 1] and j > i - 2 end
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.p = 1e-9                                       -- the other path, which drops nothing here
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-7)
  local plain = { B = 1, S = 12, H = 2, G = 2, nope = 3, rope = 0, v = 5, scale = 1, see = function() return true end }
  close(k.mla_attention(randn(12, 6) * 0 + q:narrow(1, 0, 6), kv, { H = 2, nope = 3, v = 5 }), attention(q:narrow(1, 0, 6), kv, nil, plain), 1e-11)
  equal(shape(k.mla_attention(randn(0, 6), randn(0, 16), { H = 2, nope = 3, v = 5 })), "[0, 10]")
end)

test("kernels: mla_attention refuses wrong operands on both paths", function()
  local q, kv, o = randn(6, 6), randn(6, 16), { H = 2, nope = 3, v = 5 }
  local function with(more)
    local all = {}
    for key, value in pairs(o) do all[key] = value end
    for key, value in pairs(more) do all[key] = value end
    return all
  end
  for _, p in ipairs { 0, 0.5 } do
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, B = 4 }) end, "[6, 6]")
    raises("shape", function() return k.mla_attention(q, randn(6, 15), with { p = p }) end, "[6, 15]")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, H = 0 }) end, "heads")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, rope = 2, nope = 1 }) end)
    raises("dtype", function() return k.mla_attention(q, kv:to("fp32"), with { p = p }) end)
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, window = -1 }) end, "window")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, doc_start = moe.full({ 1, 6 }, 3, int32) }) end, "doc_start[0][0]")
    raises("usage", function() return k.mla_attention(q, kv, with { p = p, head = 2 }) end, "head")
  end
  raises("shape", function() return k.rope_table(4, 3) end, "even")
  raises("config", function() return k.rope_table(4, 4, { theta = 1 }) end)
end)

test("kernels: decoding over an appended cache equals softmax over its rows, in both formats", function()
  local L, R, H, lengths = 128, 4, 3, { 70, 1, 0 }
  local table_of = { { 3, 0 }, { 1, 2 }, { 2, 2 } }
  local q_latent, q_rope = randn(3, 1, H, L), randn(3, 1, H, R)
  for _, format in ipairs { "plain", "fp8" } do
    local cache = { rows = k.make_cache_rows(4, L, R, { format = format, dtype = "fp64" }), block_table = moe.tensor(table_of, int32), latent = L, rope = R, format = format }
    equal(shape(cache.rows), format == "plain" and "[4, 64, 132]" or "[4, 64, 140]")
    local latents, ropes, sequence, position = {}, {}, {}, {}
    for b, n in ipairs(lengths) do
      for t = 0, n - 1 do
        latents[#latents + 1], ropes[#ropes + 1], sequence[#sequence + 1], position[#position + 1] = randn(L), randn(R):to("bf16"):to("fp64"), b - 1, t
      end
    end
    local latent, rope = moe.stack(latents), moe.stack(ropes)
    is(k.append_latent(cache, latent, rope, moe.tensor(sequence, int32), moe.tensor(position, int32)) == cache)
    if format == "plain" then
      same(cache.rows[0][5], moe.cat { latents[70], ropes[70] })
      same(cache.rows[3][63], moe.cat { latents[64], ropes[64] })
    end
    local out, lse = k.mla_decode(q_latent, q_rope, cache, moe.tensor(lengths, int32), 0.1)
    local first = 0
    for b, n in ipairs(lengths) do
      if n > 0 then
        local rows = latent:narrow(0, first, n)
        local scores = (q_latent[b - 1][0]:matmul(rows.T) + q_rope[b - 1][0]:matmul(rope:narrow(0, first, n).T)) * 0.1
        close(out[b - 1][0], scores:softmax(1):matmul(rows), format == "plain" and 1e-11 or 0.3, format)
        close(lse[b - 1][0], scores:exp():sum(1):log(), format == "plain" and 1e-11 or 0.3, format)
      else
        equal(out[b - 1]:abs():sum():item(), 0.0)
        equal(lse[b - 1][0][0]:item(), -inf)
      end
      first = first + n
    end
    -- A NaN in a token that is seen is not taken for a token that sees nothing.
    local one = moe.zeros({ 1 }, int32)
    k.append_latent(cache, moe.full({ 1, L }, nan, fp64), moe.zeros({ 1, R }, fp64), one, one)
    out = k.mla_decode(q_latent, q_rope, cache, moe.tensor(lengths, int32), 0.1)
    is(not out[0]:is_finite() and out[1]:is_finite(), "NaN in " .. format)
  end
end)

test("kernels: decoding refuses places outside the cache, other dtypes and formats", function()
  local cache = { rows = k.make_cache_rows(2, 8, 4), block_table = moe.tensor({ { 0, 5 } }, int32), latent = 8, rope = 4 }
  local q, r, one = moe.randn { 1, 1, 2, 8 }, moe.randn { 1, 1, 2, 4 }, moe.ones({ 1 }, int32)
  raises("shape", function() return k.mla_decode(q, r, cache, moe.full({ 1 }, 65, int32), 1) end, "block_table[0][1]", "5")
  raises("shape", function() return k.mla_decode(q, r, cache, moe.full({ 1 }, 129, int32), 1) end, "lengths[0]")
  raises("dtype", function() return k.mla_decode(q, r, cache, moe.ones({ 1 }, int64), 1) end, "int32")
  raises("dtype", function() return k.mla_decode(q:to("fp64"), r:to("fp64"), cache, one, 1) end)
  raises("usage", function() return k.mla_decode(q, r, cache, one, 0) end)
  raises("shape", function() return k.append_latent(cache, moe.zeros { 1, 8 }, moe.zeros { 1, 4 }, one, one) end, "sequence 1")
  raises("usage", function() return k.make_cache_rows(1, 8, 4, { format = "fp9" }) end, "fp8")
  raises("shape", function() return k.make_cache_rows(1, 8, 4, { format = "fp8" }) end, "multiple of 128")
  raises("usage", function() return k.mla_decode(q, r, { row = cache.rows }, one, 1) end, "rows")
  raises("shape", function() return k.mla_decode(q, r, { latent = 8, rope = 4 }, one, 1) end, "cache.rows")
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

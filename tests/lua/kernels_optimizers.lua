-- moe.kernels: steps of optimizers and sums of squares against plain loops and products of matrices.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/kernels.lua")
local test, equal, near, is, raises, randn, shape, close, same = check.test, check.equal, check.near, check.is, check.raises, check.randn, check.shape, check.close, check.same
local k = moe.kernels
local nan, inf = 0 / 0, math.huge
local fp64, int64 = { dtype = "fp64" }, { dtype = "int64" }

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

check.done()

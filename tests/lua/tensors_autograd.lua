-- Gradients, operators written in Lua, and gradients of the kernels.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises
local fp64 = { dtype = "fp64" }
local function randn(...) return moe.randn({ ... }, fp64) end
local function leaf(values) return moe.tensor(values, { dtype = "fp64", requires_grad = true }) end
local function flat(t) return table.concat(t:reshape { -1 }:to_table(), ",") end
moe.seed(3)

test("autograd: backward adds to .grad of the leaves", function()
  local x = leaf { 1, 2, 3 }
  equal(x.grad, nil)
  local y = (x * x):sum()
  is(y.requires_grad and not y.is_leaf and x.is_leaf)
  y:backward()
  equal(flat(x.grad), "2.0,4.0,6.0")
  x:sum():backward()
  equal(flat(x.grad), "3.0,5.0,7.0")
  x.grad = nil
  equal(x.grad, nil);
  (x * 2):backward(moe.tensor({ 1, 0, 1 }, fp64))
  equal(flat(x.grad), "2.0,0.0,2.0")
  x.grad = moe.zeros_like(x)
  equal(flat(x.grad), "0.0,0.0,0.0")
  raises("shape", function() (x * 2):backward() end, "y:sum()")
  raises("shape", function() (x * 2):backward(moe.ones({ 2 }, fp64)) end, "[2]")
  raises("state", function() y:backward() end)
  raises("state", function() moe.ones({ 1 }):backward() end, "requires_grad")
  raises("shape", function() x.grad = moe.ones({ 2 }, fp64) end)
  raises("dtype", function() moe.arange(3).requires_grad = true end, "int64")
  raises("usage", function() x.requires_grad = 1 end)
  raises("state", function() y.requires_grad = false end, "detach")
  raises("usage", function() x.requires_gard = true end)
end)

test("autograd: no_grad, enable_grad and detach", function()
  local x = leaf { 1 }
  local a, b = moe.no_grad(function(k) return x * k, moe.is_grad_enabled() end, 2)
  is(not a.requires_grad and b == false and moe.is_grad_enabled())
  is(moe.no_grad(function() return moe.enable_grad(function() return x * 2 end) end).requires_grad)
  is(not (x * 2):detach().requires_grad)
  pcall(moe.no_grad, function() error("stop") end)
  is(moe.is_grad_enabled(), "an error ends the mode")
  moe.no_grad(function() x:sub_(0.5) end)
  equal(x:item(), 0.5)
  raises("state", function() x:sub_(0.5) end)
  raises("usage", function() moe.no_grad(3) end)
end)

test("autograd: moe.grad of lists, twice over, unused inputs", function()
  local a, b = leaf { 2 }, leaf { 3 }
  local g = moe.grad((a * a * b):sum(), { a, b }, { retain_graph = true })
  equal(flat(g[1]) .. " " .. flat(g[2]), "12.0 4.0")
  equal(a.grad, nil)
  local first = moe.grad((a ^ 3):sum(), a, { create_graph = true })
  equal(flat(moe.grad(first:sum(), a)), "12.0")
  raises("state", function() return moe.grad((a * 2):sum(), { a, b }) end, "inputs[2]")
  equal(flat(moe.grad((a * 2):sum(), { a, b }, { allow_unused = true })[2]), "0.0")
  equal(flat(moe.grad(a * 2, a, { grad_outputs = moe.tensor({ 5 }, fp64) })), "10.0")
  raises("state", function() return moe.grad((a * 2):sum(), moe.ones { 1 }) end)
  raises("usage", function() return moe.grad((a * 2):sum(), {}) end)
end)

test("autograd: gradcheck passes what is right and names what is wrong", function()
  local ok, error = moe.gradcheck(function(a, b) return a:matmul(b):tanh(), a:exp() end, { randn(2, 3), randn(3, 2) })
  is(ok and error < 1e-6)
  is(moe.gradcheck(function(x, n) return x:softmax(0) * n end, { randn(4), 3 }))
  local wrong = moe.autograd { forward = function(_, x) return x * x end, backward = function(_, g) return g end }
  raises("state", function() return moe.gradcheck(wrong, { randn(3) }) end, "input 1")
  raises("usage", function() return moe.gradcheck(function(x) return x end, { moe.ones { 2 } }) end, "float64")
end)

test("operators: forward and backward in Lua, arguments of any kind", function()
  local scaled = moe.autograd {
    name = "scaled",
    forward = function(ctx, x, factor, y)
      ctx.factor = factor
      equal(table.concat({ tostring(ctx.needs_grad[1]), tostring(ctx.needs_grad[2]), tostring(ctx.needs_grad[3]) }, " "), "true false false")
      return x * factor + y, x * 0
    end,
    backward = function(ctx, g) return g * ctx.factor end,
  }
  local x = leaf { 1, 2 }
  local out, zero = scaled(x, 3, moe.ones({ 2 }, fp64))
  equal(flat(out), "4.0,7.0")
  equal(flat(zero), "0.0,0.0")
  is(out.requires_grad)
  out:sum():backward()
  equal(flat(x.grad), "3.0,3.0")
  equal(tostring(scaled), "operator scaled")
  is(moe.gradcheck(moe.autograd { forward = function(ctx, a, b) ctx:save(a, b) return a * b end, backward = function(ctx, g) local a, b = ctx:saved() return g * b, g * a end },
    { randn(3), randn(3) }))
end)

test("operators: saved results, a second backward, second derivatives", function()
  local exp = moe.autograd {
    forward = function(ctx, x) local y = x:exp() ctx:save(y) return y end,
    backward = function(ctx, g) return g * ctx:saved() end,
  }
  is(moe.gradcheck(exp, { randn(4) }))
  local x = leaf { 0.5 }
  local y = exp(x):sum()
  y:backward(nil, { retain_graph = true })
  y:backward()
  near(x.grad:item(), 2 * math.exp(0.5), 1e-12)
  raises("state", function() y:backward() end)
  local square = moe.autograd { forward = function(ctx, v) ctx.v = v return v * v end, backward = function(ctx, g) return g * 2 * ctx.v end }
  local v = leaf { 3 }
  local g = moe.grad(square(v):sum(), v, { create_graph = true })
  equal(moe.grad(g:sum(), v):item(), 2)
end)

test("operators: errors of either function arrive as they are, and the session goes on", function()
  local broken = moe.autograd {
    name = "broken",
    forward = function(_, x, mode)
      if mode == "forward" then error("stop here") end
      if mode == "object" then moe.fail { kind = "data", op = "mine", got = "this", want = "that" } end
      if mode == "number" then return 3 end
      if mode == "nothing" then return end
      return x * 2
    end,
    backward = function() error("in backward") end,
  }
  local x = leaf { 1, 2 }
  local err = raises("lua", function() return broken(x, "forward") end, "stop here")
  is(err.where:find("tensors_autograd.lua:%d+"))
  is(err.traceback:find("tensors_autograd.lua"), "the traceback of the inner function")
  raises("data", function() return broken(x, "object") end, "mine", "got this")
  raises("usage", function() return broken(x, "number") end, "broken: forward", "3")
  raises("usage", function() return broken(x, "nothing") end)
  err = raises("lua", function() broken(x):sum():backward() end, "in backward")
  is(err.traceback:find("tensors_autograd.lua"))
  local odd = moe.autograd { forward = function(_, v) return v * 1 end, backward = function() return moe.ones({ 3 }, fp64) end }
  raises("shape", function() odd(x):sum():backward() end, "[3]", "[2]")
  local text = moe.autograd { forward = function(_, v) return v * 1 end, backward = function() return "x" end }
  raises("usage", function() text(x):sum():backward() end, '"x"')
  raises("usage", function() return moe.autograd { backward = print } end, "forward")
  raises("usage", function() return moe.autograd { forwrad = print } end, "forward")
  local constant = moe.autograd { forward = function(_, v) return v * 1 end }
  is(not constant(x).requires_grad)
  is(not constant(moe.ones { 1 }).requires_grad)
end)

test("operators: graphs that are dropped leave nothing behind", function()
  local keep = setmetatable({}, { __mode = "k" })
  local op = moe.autograd { forward = function(ctx, v) local mark = {} keep[mark] = true ctx.mark = mark ctx:save(v * 1) return v * 2 end, backward = function(_, g) return g end }
  local x = leaf { 1 }
  for _ = 1, 200 do op(x) end
  collectgarbage()
  op(x)
  collectgarbage()
  local n = 0
  for _ in next, keep do n = n + 1 end
  is(n < 20, n .. " contexts are left")
end)

test("operators: in a coroutine, and inside of each other", function()
  local inner = moe.autograd { forward = function(ctx, x) ctx.x = x return x * x end, backward = function(ctx, g) return g * ctx.x * 2 end }
  local x = leaf { 3 }
  local co = coroutine.wrap(function()
    inner(inner(x)):sum():backward()
    coroutine.yield(x.grad:item())
  end)
  equal(co(), 4 * 27)
end)

local k = moe.kernels
local function close(got, want, tolerance, what)
  equal(tostring(got.shape), tostring(want.shape), what)
  local error = got:numel() > 0 and (got:double() - want:double()):abs():max():item() or 0
  is(error <= (tolerance or 1e-10), ("%s differs by %g"):format(what or "it", error))
end

test("kernels: each agrees with its reference", function()
  local x, gamma, beta, w = randn(5, 8), randn(8), randn(8), randn(6, 8)
  close(k.rmsnorm(x, gamma), k.rmsnorm.reference(x, gamma))
  close(k.layernorm(x, gamma, beta, { eps = 0.5 }), k.layernorm.reference(x, gamma, beta, { eps = 0.5 }))
  close(k.swiglu(x, randn(5) * 0 + 2), k.swiglu.reference(x, moe.full({ 5 }, 2.0, fp64)))
  for _, name in ipairs { "linear", "linear_wide", "linear_fp64" } do close(k[name](x, w), k[name].reference(x, w), nil, name) end
  local ids = moe.tensor { 0, 5, 5, 2, 1 }
  close(k.embed(ids, w), k.embed.reference(ids, w))
  local loss, by_token = k.head_loss(x, w, ids, { scale = 0.5 })
  local want, want_by_token = k.head_loss.reference(x, w, ids, { scale = 0.5 })
  close(loss, want)
  close(by_token, want_by_token, 1e-6)
  local o = { top_k = 2, n_group = 4, topk_group = 2, scale = 2.5 }
  local logits, bias = randn(9, 8), randn(8)
  local got, ref = { k.route(logits, bias, o) }, { k.route.reference(logits, bias, o) }
  for i = 1, 3 do close(got[i], ref[i], nil, "route " .. i) end
  local chosen = moe.tensor { { 1, 0 }, { 2, 1 }, { -1, 1 } }
  local plan, rows_of, weights = k.sort_by_expert(chosen, 4, { align = 4 }), randn(3, 4), randn(3, 2)
  local rows, row_weights = k.permute(rows_of, weights, plan)
  local want_rows, want_weights = k.permute.reference(rows_of, weights, plan)
  close(rows, want_rows)
  close(row_weights, want_weights)
  close(k.unpermute(rows_of, rows, plan), k.unpermute.reference(rows_of, rows, plan))
  local experts = randn(4, 3, 4)
  close(k.grouped_linear(rows, plan, experts), k.grouped_linear.reference(rows, plan, experts))
  close(k.sum_of_squares(x), k.sum_of_squares.reference(x))
  local g, m, v = randn(5, 8), randn(5, 8), randn(5, 8):abs()
  local opt = { lr = 0.1, weight_decay = 0.2, grad_scale = 0.5, step = 3 }
  local w1, m1, v1 = k.adamw.reference(x, g, m, v, opt)
  local copy = x:clone()
  k.adamw(copy, g, m, v, opt)
  close(copy, w1)
  close(m, m1)
  close(v, v1)
  local master, buffer = randn(6), randn(6)
  local sgd = { lr = 0.1, momentum = 0.9, weight_decay = 0.1 }
  local gs = randn(6)
  local want_master, want_buffer = k.sgd.reference(master, gs, buffer, sgd)
  k.sgd(master, gs, buffer, sgd)
  close(master, want_master)
  close(buffer, want_buffer)
  local gm = randn(2, 6, 4)
  close(k.newton_schulz(gm, { products = "fp64" }), k.newton_schulz.reference(gm), 1e-8)
  local q, scale = k.quantize_rows(moe.randn { 5, 200 })
  close(k.dequantize_rows(q, scale), k.dequantize_rows.reference(q, scale), 1e-6)
  local qw, _, sw = k.quantize_weight(moe.randn { 2, 130, 140 })
  close(k.dequantize_weight(qw, sw), k.dequantize_weight.reference(qw, sw), 1e-6)
  local cos, sin = k.rope_table(6, 4)
  local want_cos, want_sin = k.rope_table.reference(6, 4)
  close(cos, want_cos)
  close(sin, want_sin)
  local a = { H = 2, G = 1, nope = 4, rope = 4, v = 3, B = 2, softmax_scale = 0.5, window = 4, k_rope = randn(12, 4), cos = cos, sin = sin }
  local qq, kv = randn(12, 2 * 8), randn(12, 7)
  close(k.mla_attention(qq, kv, a), k.mla_attention.reference(qq, kv, a))
  a.interleaved = false
  close(k.mla_attention(qq, kv, a), k.mla_attention.reference(qq, kv, a))
  equal(k.count_pairs.reference, nil)
  raises("usage", function() return k.rmsnorm.refrence end, "reference")
  check.contains(moe.help_text(k.rmsnorm.reference), "float64")
end)

test("kernels: gradients of inputs and weights against differences", function()
  local x, gamma, beta, w, ids = randn(3, 4), randn(4), randn(4), randn(5, 4), moe.tensor { 0, 4, 2 }
  local function checked(name, f, inputs) is(moe.gradcheck(f, inputs), name) end
  checked("rmsnorm", k.rmsnorm, { x, gamma })
  checked("layernorm", k.layernorm, { x, gamma, beta })
  checked("swiglu", k.swiglu, { x, randn(3) })
  checked("linear", k.linear, { x, w })
  checked("linear_wide", k.linear_wide, { x, w })
  checked("linear_fp64", k.linear_fp64, { x, w })
  checked("grouped_linear", function(a, b) return k.grouped_linear(a, moe.tensor { 0, 2, 2, 3 }, b) end, { x, randn(3, 2, 4) })
  checked("embed", function(b) return k.embed(ids, b) end, { w })
  checked("head_loss", function(a, b) return (k.head_loss(a, b, ids)) end, { x, w })
  checked("route", function(a) local _, weights = k.route(a, nil, { top_k = 2 }) return weights end, { randn(3, 8) })
  local plan = k.sort_by_expert(moe.tensor { { 1, 0 }, { 2, 1 }, { 0, 2 } }, 3)
  checked("permute", function(a, b) return k.permute(a, b, plan) end, { x, randn(3, 2) })
  checked("unpermute", function(a, b) return k.unpermute(a, b, plan) end, { x, randn(6, 4) })
  checked("mla_attention", function(a, b) return k.mla_attention(a, b, { H = 2, nope = 2, v = 3, softmax_scale = 0.5 }) end, { randn(3, 4), randn(3, 10) })
  checked("dropout", function(a) return k.dropout(a, 0.5, { seed = 4 }) end, { x })
end)

test("kernels: gradients equal the reference's, weights alone, twice over the same graph", function()
  local x = randn(5, 8)
  local gamma = randn(8)
  local a, b = gamma:clone():requires_grad_(), gamma:clone():requires_grad_()
  local y = k.rmsnorm(x, a):sum()
  y:backward(nil, { retain_graph = true })
  k.rmsnorm.reference(x, b):sum():backward()
  close(a.grad, b.grad)
  y:backward()
  close(a.grad, b.grad * 2)
  local half = moe.ones({ 8 }, { dtype = "bf16", requires_grad = true })
  k.rmsnorm(x:bfloat16(), half):sum():backward()
  equal(half.grad.dtype, "bfloat16")
  is(not moe.no_grad(k.rmsnorm, x, a).requires_grad)
end)

check.done()

-- Layers and their parts as functions.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()
local small = dofile(arg[0]:match("^(.*)/") .. "/lib/small_run.lua")(check, folder)
local cfg, fresh, weights, must_equal = small.cfg, small.fresh, small.weights, small.must_equal

test("layers: 0-based, counted, printed; ipairs says how", function()
  local m = moe.model(cfg)
  equal(#m.layers, 3)
  equal(m.layers[2].index, 2)
  equal(m:layer(0).index, 0)
  contains(tostring(m.layers[1]), "attention, route")
  raises("usage", function() return m.layers[3] end, "0 to 2")
  raises("usage", function() return m.layers[-1] end)
  raises("usage", function() return m:layer(1.5) end)
  raises("usage", function() ipairs(m.layers) end, "ipairs")
  raises("usage", function() return m.layers.first end)
  raises("state", function() return m.layers[0].experts end, "experts")
  raises("state", function() return m.layers[1].feed_forward end)
  is(m.layers[1].parameters["mlp.gate.weight"].shape[1] == 6)
end)

test("layers: one after the other they are the model", function()
  local m = moe.model(cfg)
  local ids = moe.randint(0, 264, { 2, 5 })
  local p = m:parameters()
  local rows = {}
  for b = 0, 1 do for s = 0, 4 do rows[#rows + 1] = p["model.embed_tokens.weight"][ids[b][s]:item()] end end
  local h = moe.stack(rows):reshape { 2, 5, 32 }
  for i = 0, #m.layers - 1 do h = m.layers[i]:forward(h) end
  local n = h / ((h * h):mean(-1, { keepdim = true }) + m.config.model.norm_eps):sqrt() * p["model.norm.weight"]
  local logits = n:matmul(p["lm_head.weight"].T)
  near((logits - m:logits(ids)):abs():max():item(), 0, 1e-4)
end)

test("layers: parts make up a layer", function()
  local m = moe.model(cfg)
  local x = moe.randn { 9, 32 }
  local dense, routed = m.layers[0], m.layers[1]
  near((dense.feed_forward:forward(dense.attention:forward(x)) - dense:forward(x)):abs():max():item(), 0, 1e-6)
  near((routed.experts:forward(routed.attention:forward(x)) - routed:forward(x)):abs():max():item(), 0, 1e-6)
  local r = routed.router:forward(x)
  equal(table.concat(r.ids.shape, ","), "9,2")
  near((r.weights:sum(-1) - 1):abs():max():item(), 0, 1e-5)
  equal(table.concat(routed.shared_experts:forward(r.hidden).shape, ","), "9,32")
  local h = routed.router:mask { expert = 0 }
  equal(routed.router:forward(x).ids:eq(0):to("int64"):sum():item(), 0)
  contains(tostring(routed.router), "mask")
  h:undo()
end)

local has_grad = pcall(function() return moe.zeros { 1 }.requires_grad_ end)
if has_grad then test("layers: gradients go through", function()
  local m = moe.model(cfg:with { training = { use_fp64 = true } })
  local x = moe.randn({ 4, 32 }, { dtype = "fp64" })
  local e = moe.zeros({ 4, 32 }, { dtype = "fp64" })
  e[2] = e[2] + 1e-5
  local plus, minus = m.layers[0]:forward(x + e):sum():item(), m.layers[0]:forward(x - e):sum():item()
  x:requires_grad_(true)
  m.layers[0]:forward(x):sum():backward()
  near(x.grad[2]:sum():item(), (plus - minus) / 2e-5, 1e-5)
end) end

if has_grad then test("layers: a run's next step does not see gradients of a script", function()
  local a, b = fresh(), fresh()
  a:train(1) b:train(1)
  local x = moe.randn { 4, 32 }
  x:requires_grad_(true)
  a.model.layers[1]:forward(x):sum():backward()
  a:train(1) b:train(1)
  must_equal(a, b)
end) end

test("layers: bad input", function()
  local m = moe.model(cfg)
  raises("shape", function() m.layers[0]:forward(moe.randn { 4, 31 }) end, "32")
  raises("dtype", function() m.layers[0]:forward(moe.zeros({ 4, 32 }):to("int64")) end)
  raises("usage", function() m.layers[0]:forward(3) end)
  raises("usage", function() m.router:forward(moe.randn { 4, 32 }) end, "one layer")
  raises("state", function() m.router.balance = moe.balance.none() end, "run")
end)

check.done()

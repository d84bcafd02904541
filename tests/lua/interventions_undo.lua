-- Interventions: undo in any order, resume and replay, also of two ranks.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()
local HERE = { device = moe.default_device() }      -- where runs and models are
local small = dofile(arg[0]:match("^(.*)/") .. "/lib/small_run.lua")(check, folder)
local cfg, fresh, weights, same, must_equal, counts = small.cfg, small.fresh, small.weights, small.same, small.must_equal, small.counts

-- A bit of everything, the same from step 0, from a checkpoint in the middle, and without breaks.
local function story(run, from, to)
  local r = run.model.router
  local shift = 0.05
  local noise = { scale = 0.02, deep = { 1, 2 } }
  local acts = {
    [2] = function() mask = r:mask { layer = 2, expert = 5 } end,
    [3] = function() r:hook("pre_topk", function(s) return s.scores + noise.scale * moe.randn_like(s.scores) + shift * math.random() end) end,
    [4] = function() mask:undo() r:override { top_k = 3, layer = 1 } end,
    [5] = function() r:swap { layer = 1, experts = { 0, 2 } } r:reinit { layer = 2, expert = 1 } end,
    [6] = function() run:undo() run:set { learning_rate = 1e-3, global_batch_size = 8 } end,
    [7] = function() r.balance = moe.balance.aux { alpha = 1e-2 } r:ablate { layer = 2, expert = 0 } end,
    [8] = function() r.balance = function(counts, bias) local d = counts:to("fp64"):mean() - counts:to("fp64") return bias + 0.01 * (d:gt(0):to("fp64") - d:lt(0):to("fp64")) end r:duplicate { layer = 1, from = 3, to = 4 } end,
    [9] = function() run.model:set("lm_head.weight", run.model:parameters()["lm_head.weight"] * 0.5) r:bias { layer = 1, offset = 0.1 } end,
    [10] = function() run.schedule = function(step) return 1e-3 / step end end,
  }
  for step = from, to do
    if acts[step] then acts[step]() end
    run:train(1)
  end
end

test("replay: ends bit-equal, from the run and from its checkpoint", function()
  local run = fresh { log = true, name = "story" }
  story(run, 1, 11)
  local again = moe.replay(run, { console = false, log = false })
  equal(again.step, 11)
  must_equal(run, again)
  local path = run:save("end")
  run:train(1)
  again = moe.replay(path, { console = false, log = false })
  equal(again.step, 11)
  again:train(1)
  must_equal(run, again)
  local other = fresh()
  other:train(12)
  is(not same(weights(run), weights(other)), "the interventions changed nothing")
end)

test("resume: goes on with the interventions, hooks compiled from their source", function()
  local whole = fresh { log = true, name = "whole" }
  story(whole, 1, 11)
  local run = fresh { log = true, name = "broken" }
  story(run, 1, 7)
  run:save("middle")
  local resumed = moe.resume("middle", nil, { console = false })
  equal(resumed.step, 7)
  equal(#resumed.events, #run.events)            -- the save's own event came after it, the resume's instead
  is(tostring(resumed.model.router):find("pre_topk"))
  story(resumed, 8, 11)
  must_equal(whole, resumed)
  -- What was made before the break can be undone after it, but for the weights that were drawn over.
  for i = 1, 4 do resumed:undo() end
  resumed:train(1)
  must_equal(moe.replay(resumed, { console = false, log = false }), resumed)
end)

-- Undo out of order. What is expected is a second run that makes the acts that are left, in their order, and never made the others.
local function expert(run, layer, e, matrix) return run.model:parameters()[("model.layers.%d.mlp.experts.%d.%s.weight"):format(layer, e, matrix or "up_proj")] end

test("undo: a key that a later act changed, too, stays as that one left it", function()
  local run = fresh()
  local lr = run.config.training.learning_rate
  local first, second = run:set { learning_rate = 1e-4, weight_decay = 0.3 }, run:set { learning_rate = 2e-4 }
  first:undo()
  equal(run.config.training.learning_rate, 2e-4)
  equal(run.config.training.weight_decay, fresh().config.training.weight_decay)
  equal(run.events[3].new["training.learning_rate"], 2e-4)
  second:undo()
  equal(run.config.training.learning_rate, lr)
  local speed = run.config.model.moe.bias_update_speed
  run.model.router.balance = moe.balance.none()
  local none = run.events[#run.events].id
  local by_hand = run:set { bias_update_speed = 0.5 }
  run.model.router.balance = moe.balance.aux_free()          -- with the speed that it finds
  equal(run.config.model.moe.bias_update_speed, 0.5)
  by_hand:undo()
  equal(run.config.model.moe.bias_update_speed, 1e-3)         -- none's 0 is not a speed
  run:undo()
  equal(run.config.model.moe.bias_update_speed, 0)
  run:undo()
  equal(run.config.model.moe.bias_update_speed, speed)
end)

test("undo: a balance below another one goes away without a trace", function()
  local run, other = fresh(), fresh()
  local r = run.model.router
  r.balance = moe.balance.aux { alpha = 1e-2 }
  local below = run.events[1].id
  r.balance = moe.balance.aux_free { rule = "centred" }
  local h = run:set { bias_update_rule = "sign" }
  run:undo(below)
  equal(run.config.model.moe.bias_update_rule, "sign")
  h:undo()
  equal(run.config.model.moe.bias_update_rule, "centred")
  other.model.router.balance = moe.balance.aux_free { rule = "centred" }
  run:train(2) other:train(2)
  must_equal(run, other)
end)

test("undo: biases and parameters that were set twice", function()
  local run = fresh()
  run:train(2)
  local start = weights(run)
  local a = run.model.router:bias { layers = { 1, 2 }, set = { 1, 2, 3, 4, 5, 6 } }
  local b = run.model.router:bias { layer = 1, set = 0.5 }
  a:undo()
  near((run.model:bias(1) - 0.5):abs():max():item(), 0)
  equal((run.model:bias(2) - start["bias 2"]):abs():max():item(), 0)
  b:undo()
  is(same(start, weights(run)))
  run.model:set("lm_head.weight", start["lm_head.weight"] * 2)
  local first = run.events[#run.events].id
  run.model:set("lm_head.weight", start["lm_head.weight"] * 3)
  run:undo(first)
  equal((run.model:parameters()["lm_head.weight"] - start["lm_head.weight"] * 3):abs():max():item(), 0)
  run:undo()
  is(same(start, weights(run)))
  raises("state", function() run:undo(first) end, "not in force")
  raises("usage", function() run:undo(0) end)
end)

test("undo: experts that were swapped, copied and drawn, in every order", function()
  local acts = {
    function(r) return r:swap { layer = 1, experts = { 0, 1 }, gate = true } end,
    function(r) return r:reinit { layer = 1, expert = 1, seed = 5, gate = true } end,
    function(r) return r:duplicate { layer = 1, from = 1, to = 2, gate = true } end,
    function(r) return r:swap { layer = 1, experts = { 1, 2 } } end,
    function(r) return r:bias { layer = 1, set = 0.25 } end,
    function(r) return r:duplicate { layer = 1, from = 2, to = 0 } end,
  }
  local function done(list)
    local run = fresh()
    run:train(1)
    local handles = {}
    for i, act in ipairs(acts) do if list[i] then handles[i] = act(run.model.router) end end
    return run, handles
  end
  for _, order in ipairs { { 1, 3, 5, 2 }, { 6, 2, 1 }, { 4, 3, 2, 1, 6, 5 }, { 2, 6, 4 } } do
    local left = { true, true, true, true, true, true }
    local run, handles = done(left)
    for _, i in ipairs(order) do
      handles[i]:undo()
      left[i] = false
      local ok, name = same(weights(done(left)), weights(run))
      is(ok, ("after undoing %d of %s: %s"):format(i, table.concat(order, " "), tostring(name)))
    end
  end
end)

test("undo: what was trained since goes with its expert; what lay covered comes back as it was", function()
  local run = fresh()
  local before = expert(run, 1, 3):clone()
  local drawn = run.model.router:reinit { layer = 1, expert = 3 }
  run:train(1)
  local swap = run.model.router:swap { layer = 1, experts = { 3, 5 } }
  run:train(1)
  local trained = expert(run, 1, 5):clone()
  drawn:undo()
  equal((expert(run, 1, 5) - before):abs():max():item(), 0)
  is((trained - before):abs():max():item() > 1e-3)
  local other = expert(run, 1, 3):clone()
  swap:undo()
  equal((expert(run, 1, 3) - before):abs():max():item(), 0)
  equal((expert(run, 1, 5) - other):abs():max():item(), 0)
end)

test("undo: weights of the last sixteen acts are kept", function()
  local run = fresh()
  local start, handles = weights(run), {}
  for i = 0, 17 do handles[i] = run.model.router:reinit { layer = 1 + i % 2, expert = i // 2 % 6 } end
  handles[6]:undo()
  equal((expert(run, 1, 3) - start["model.layers.1.mlp.experts.3.up_proj.weight"]):abs():max():item(), 0)
  handles[1]:undo()                                          -- covered by 13: nothing comes back
  local now = weights(run)
  raises("state", function() handles[13]:undo() end, "gone")
  is(same(now, weights(run)))
  is(handles[13].active)
end)

-- Acts of every kind, some undone after later ones of their kind, with training between.
local function tangle(run, from, to)
  local r = run.model.router
  local h = {}
  local acts = {
    [2] = function() h.lr = run:set { learning_rate = 1e-3 } h.bias = r:bias { layer = 1, set = 0.1 } h.swap = r:swap { layer = 2, experts = { 0, 1 }, gate = true } end,
    [3] = function() h.lr2 = run:set { learning_rate = 2e-3, weight_decay = 0.2 } h.apart = r:swap { layer = 1, experts = { 2, 5 } } h.bias2 = r:bias { layer = 1, set = { 0, 0, 0.1, 0, 0, 0 } } h.drawn = r:reinit { layer = 2, expert = 1 } end,
    [4] = function() h.lr:undo() h.bias:undo() h.copy = r:duplicate { layer = 2, from = 1, to = 4 } end,
    [5] = function() r.balance = moe.balance.aux { alpha = 1e-2 } r.balance = moe.balance.aux_free { speed = 0.05 } end,
    [7] = function() run:undo() h.lr2:undo() end,
    [8] = function() if h.swap then h.swap:undo() end end,
  }
  for step = from, to do
    if acts[step] then acts[step]() end
    run:train(1)
  end
  return h
end

test("replay: undos out of order end bit-equal", function()
  local run = fresh { log = true, name = "tangle" }
  tangle(run, 1, 9)
  must_equal(moe.replay(run, { console = false, log = false }), run)
end)

test("resume: undos out of order after a break; what a checkpoint does not carry is refused and changes nothing", function()
  local whole, run = fresh { log = true, name = "tangle-whole" }, fresh { log = true, name = "tangle-broken" }
  local handles = tangle(whole, 1, 6)
  tangle(run, 1, 6)
  run:save("tangle-middle")
  local resumed = moe.resume("tangle-middle", nil, { console = false })
  must_equal(whole, resumed)
  local last = whole.events[#whole.events].id
  for _, id in ipairs { last, handles.lr2.id, handles.bias2.id, handles.apart.id } do
    for _, of in ipairs { whole, resumed } do of:undo(id) of:train(1) end
    must_equal(whole, resumed)
  end
  equal(resumed.config.training.learning_rate, cfg.training.learning_rate)
  local start = weights(resumed)
  for _, h in ipairs { handles.drawn, handles.swap, handles.copy } do raises("state", function() resumed:undo(h.id) end, "gone") end
  is(same(start, weights(resumed)))
  resumed:train(1)
  handles.drawn:undo()
  must_equal(moe.replay(resumed, { console = false, log = false }), resumed)
end)

test("resume: keys that it changes, then interventions, are replayed", function()
  local run = fresh { log = true, name = "changed" }
  run:train(1)
  run.model.router:mask { layer = 1, expert = 0 }
  run:save("changed")
  local resumed = moe.resume("changed", { training = { learning_rate = 1e-4 } }, { console = false })
  local h = resumed:set { learning_rate = 5e-4 }
  resumed:train(1)
  h:undo()
  equal(resumed.config.training.learning_rate, 1e-4)
  resumed.model.router:swap { layer = 1, experts = { 2, 3 } }
  resumed:train(1)
  must_equal(moe.replay(resumed, { console = false, log = false }), resumed)
end)

test("resume: in another precision, which restore and replay of such a run refuse", function()
  local run = fresh { log = true, name = "precision" }
  run:train(1)
  local saved = run:save("start")
  run:close()
  local again = moe.resume(saved, { training = { use_bf16 = true } }, { console = false })
  again:train(1)
  raises("config", function() again:restore(saved) end, "use_bf16")
  again:train(1)
  raises("state", function() moe.replay(again, { console = false, log = false }) end, "use_bf16")
  again:close()
end)

test("resume: a hook with replay = false is off, and said so", function()
  local run = fresh { log = true, name = "lost" }
  local t = {}
  run.model.router:hook("pre_topk", function(s) t.x = run return s.scores * 0 + moe.tensor({ 0.6, 0.5, 0.4, 0.3, 0.2, 0.1 }, HERE) end, { replay = false })
  run:train(1)
  equal(counts(run, 1, 0), 128)
  run:save("lost")
  local resumed = moe.resume("lost", nil, { console = false })
  resumed:train(1)
  is(counts(resumed, 1, 0) < 128)
end)

test("run: keys that a resume could not change are resumed as they were set", function()
  local run = fresh { log = true, name = "live" }
  run:train(1)
  run:set { global_batch_size = 8 }
  run:train(1)
  run:save("live")
  local folder = run.folder
  run:close()
  local again = moe.run { config = cfg, console = false, resume = folder .. "/checkpoints/live" }
  equal(again.config.training.global_batch_size, 8)
  again:train(1)
  equal(again:counts()[1]:sum():item(), 8 * 32 * 2)
end)

local ON_RANKS = "ranks: acts on experts of two ranks, a scripted optimizer, undos out of order; save, resume and replay"
if check.has_ranks(ON_RANKS) then test(ON_RANKS, function()
  local script = folder .. "/ranks.lua"
  local out = assert(io.open(script, "w"))
  out:write(([[
    local check = dofile(%q .. "/lib/check.lua")
    local small = dofile(%q .. "/lib/small_run.lua")(check, %q)
    local cfg = small.cfg:with { experiment_name = "on-ranks", training = { micro_batch_size = 1 }, distributed = { expert_parallel_size = 2, zero_stage = 1 } }
    local run = moe.run { config = cfg, console = false }
    local r = run.model.router
    run:train(1)
    local swap = r:swap { layer = 1, experts = { 0, 5 }, gate = true }
    local drawn = r:reinit { layer = 1, expert = 5 }
    local bias = r:bias { layers = { 1, 2 }, set = 0.2 }
    run.optimizer = function(name, value, grad, state, m) state[1]:copy_(0.9 * state[1] + grad) return value - m.lr * state[1] / (1e-6 + state[1]:norm()) end
    run:train(2)
    r:bias { layer = 1, set = { 1, 0, 0, 0, 0, 0 } }
    r:duplicate { layer = 2, from = 4, to = 1 }
    bias:undo() swap:undo() drawn:undo()
    run:train(1)
    local path = run:save("ranks")
    run:train(2)
    small.must_equal(moe.replay(run, { console = false, log = false }), run)
    local resumed = moe.resume(path, nil, { console = false })
    resumed:train(2)
    small.must_equal(resumed, run)
    print("loss " .. resumed:train(1).loss)
    check.done()
  ]]):format(arg[0]:match("^(.*)/"), arg[0]:match("^(.*)/"), folder))
  out:close()
  local text, code = check.moelab(("run --ranks 2 '%s'"):format(script))
  equal(code, 0, text)
  contains(text, "loss ")
end) end

check.done()

-- Interventions: what they do to the router, and their events. Undo, resume and replay are interventions_undo.lua's.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()
local HERE = { device = moe.default_device() }      -- where runs and models are
local small = dofile(arg[0]:match("^(.*)/") .. "/lib/small_run.lua")(check, folder)
local cfg, fresh, weights, same, must_equal, counts = small.cfg, small.fresh, small.weights, small.same, small.must_equal, small.counts

test("router: a masked expert gets no token, and does after undo", function()
  local run = fresh()
  local h = run.model.router:mask { layer = 2, expert = 3 }
  run:train(1)
  equal(counts(run, 2, 3), 0)
  is(counts(run, 1, 3) > 0, "layer 1 is not masked")
  equal(run:counts():sum():item(), 2 * 4 * 32 * 2)
  is(h.active)
  h:undo()
  is(not h.active)
  run:train(1)
  is(counts(run, 2, 3) > 0)
  raises("state", function() h:undo() end, "not in force")
end)

test("router: unmask, several layers, <close>", function()
  local run = fresh()
  do
    local _ <close> = run.model.router:mask { layers = { 1, 2 }, experts = { 0, 5 } }
    run.model.router:unmask { layer = 1, expert = 5 }
    run:train(1)
    equal(counts(run, 1, 0) + counts(run, 2, 0) + counts(run, 2, 5), 0)
    is(counts(run, 1, 5) > 0)
  end
  run:train(1)
  is(counts(run, 1, 0) > 0 and counts(run, 2, 5) > 0)
end)

test("router: masks must leave a token its experts", function()
  local run = fresh()
  raises("usage", function() run.model.router:mask { layer = 1, experts = { 0, 1, 2, 3, 4 } } end, "1 experts left", "at least 2")
  equal(#run.events, 0)
  local h = run.model.router:override { top_k = 1 }
  run.model.router:mask { layer = 1, experts = { 0, 1, 2, 3, 4 } }
  raises("usage", function() h:undo() end, "experts left")
  run:train(1)
  equal(counts(run, 1, 5), 4 * 32)
end)

test("router: top_k and temperature are overridden, in some layers", function()
  local run = fresh()
  local h = run.model.router:override { top_k = 1, layer = 2 }
  run:train(1)
  equal(run:counts()[2]:sum():item(), 4 * 32)
  equal(run:counts()[1]:sum():item(), 4 * 32 * 2)
  h:undo()
  run.model.router:override { temperature = 3 }
  local x = moe.randn({ 5, 32 }, HERE)
  local hot = run.model.layers[1].router:forward(x).weights:clone()
  run:undo()
  local cold = run.model.layers[1].router:forward(x).weights
  is((hot - cold):abs():max():item() > 1e-6)
end)

test("router: every token is forced to given experts, or by its id", function()
  local run = fresh()
  local h = run.model.router:force { layer = 1, experts = { 4, 2 } }
  run:train(1)
  equal(counts(run, 1, 4), 128)
  equal(counts(run, 1, 2), 128)
  h:undo()
  local rows = {}
  for token = 0, 263 do rows[#rows + 1] = { token % 6 } end
  run.model.router:force { layer = 1, by_token = rows }
  run:train(1)
  equal(run:counts()[1]:sum():item(), 128)
  raises("shape", function() run.model.router:force { layer = 1, by_token = { { 1 } } } end, "264")
end)

test("router: an ablated expert is chosen, adds nothing and does not learn", function()
  local run = fresh()
  local x = moe.randn({ 6, 32 }, HERE)
  run.model.router:force { layer = 1, experts = { 3, 1 } }
  run.model.router:ablate { layer = 1, experts = { 1, 3 } }
  local out, hidden = run.model.layers[1].experts:forward(x), run.model.layers[1].router:forward(x)
  equal(hidden.weights:abs():max():item(), 0)
  near((out - (x + run.model.layers[1].shared_experts:forward(hidden.hidden))):abs():max():item(), 0, 1e-6)
  local name = "model.layers.1.mlp.experts.3.down_proj.weight"
  local before = run.model:parameters()[name]:clone()
  run:set { weight_decay = 0 }
  run:train(2)
  equal((run.model:parameters()[name] - before):abs():max():item(), 0)
  equal(counts(run, 1, 3), 128)
end)

test("router: bias is set, offset, frozen", function()
  local run = fresh()
  local h = run.model.router:bias { layer = 1, set = { 1, 0, 0, 0, 0, 2 } }
  near(run.model:bias(1)[5]:item(), 2)
  h:undo()
  near(run.model:bias(1)[5]:item(), 0)
  run.model.router:bias { layer = 1, offset = { 5, 5, 0, 0, 0, 0 } }
  run.model.router:freeze { layer = 1 }
  run:train(2)
  equal(counts(run, 1, 0) + counts(run, 1, 1), 256)
  near(run.model:bias(1):abs():max():item(), 0)
  is(run.model:bias(2):abs():max():item() > 0)
end)

test("router: experts are swapped, duplicated and drawn anew, and put back", function()
  local run = fresh()
  run:train(2)
  local start = weights(run)
  local e = "model.layers.1.mlp.experts.%d.up_proj.weight"
  local h = run.model.router:swap { layer = 1, experts = { 0, 4 } }
  local p = run.model:parameters()
  equal((p[e:format(0)] - start[e:format(4)]):abs():max():item(), 0)
  equal((p[e:format(4)] - start[e:format(0)]):abs():max():item(), 0)
  h:undo()
  is(same(start, weights(run)))
  h = run.model.router:duplicate { layer = 2, from = 1, to = 5, gate = true }
  p = run.model:parameters()
  local d = "model.layers.2.mlp.experts.%d.down_proj.weight"
  equal((p[d:format(5)] - p[d:format(1)]):abs():max():item(), 0)
  local gate = p["model.layers.2.mlp.gate.weight"]
  equal((gate[5] - gate[1]):abs():max():item(), 0)
  h:undo()
  is(same(start, weights(run)))
  h = run.model.router:reinit { layer = 1, expert = 2 }
  is((run.model:parameters()[e:format(2)] - start[e:format(2)]):abs():max():item() > 1e-3)
  local drawn = run.model:parameters()[e:format(2)]
  near((drawn * drawn):mean():sqrt():item(), 0.06, 0.01)
  h:undo()
  is(same(start, weights(run)))
  -- A swap of weights and routes only renames: the loss is the same.
  local before = run:eval().loss
  run.model.router:swap { layer = 1, experts = { 0, 4 }, gate = true }
  near(run:eval().loss, before, 1e-5)
end)

test("router: hooks before and after the choice", function()
  local run = fresh()
  local h = run.model.router:hook("pre_topk", function(s)
    return s.layer == 1 and s.scores * 0 + moe.tensor({ 0.1, 0.2, 0.3, 0.4, 0.5, 0.6 }, HERE) or nil
  end)
  run:train(1)
  equal(counts(run, 1, 5), 128)
  equal(counts(run, 1, 4), 128)
  h:undo()
  run.model.router:hook("post_topk", function(s) return s.ids * 0 + moe.tensor({ 2, 0 }, HERE), s.weights * 0 + 0.5 end, { layer = 2 })
  run:train(1)
  equal(counts(run, 2, 2) + counts(run, 2, 0), 256)
end)

test("router: a hook's error is an error object with its place, the step is undone and the run goes on", function()
  local a, b = fresh(), fresh()
  a:train(1) b:train(1)
  local h = a.model.router:hook("pre_topk", function(s) error("no such luck") end)
  local err = raises("lua", function() a:train(1) end, "hook pre_topk, ", "interventions.lua:157, layer 1, at step 2: no such luck")
  raises("lua", function() a:evaluate { max_batches = 1 } end, "layer 1, outside of training: no such luck")
  contains(err.traceback, "interventions")
  equal(a.step, 1)
  h:undo()
  h = a.model.router:hook("pre_topk", function(s) return s.scores[0] end)
  raises("shape", function() a:train(1) end, "pre_topk: scores, layer 1, at step 2: got [")
  h:undo()
  h = a.model.router:hook("pre_topk", function(s) moe.nothing_there() end)
  raises("usage", function() a:train(1) end, "nothing_there")
  h:undo()
  h = a.model.router:hook("pre_topk", function(s) return s.scroes end)
  raises("usage", function() a:train(1) end, "decision.scroes: got no such field", 'did you mean "scores"?')
  h:undo()
  local model, calls = a.model, 0
  h = model.router:hook("pre_topk", function(s) calls = calls + 1 model:logits { { 1, 2 } } end, { replay = false })
  raises("state", function() model:logits { { 1, 2, 3 } } end, "a call from inside of itself", "run no model that calls them")
  equal(calls, 1)
  h:undo()
  a:train(2) b:train(2)
  must_equal(a, b)
end)

test("router: nothing may be changed inside of a step", function()
  local run = fresh()
  local h = run.model.router:hook("pre_topk", function(s) the_run.model.router:mask { layer = 1, expert = 0 } end)
  the_run = run
  raises("state", function() run:train(1) end, "inside of a step")
  h:undo()
  run:train(1)
  the_run = nil
end)

test("router: a stored hook keeps the globals that it reads, and may record into others", function()
  local run = fresh()
  strength, offsets, seen, calls = 0.5, { layer = 1, values = { 0.1, 0.2 } }, {}, 0
  function bend(x) return x * strength end
  local function f(s)
    calls = calls + 1
    seen[#seen + 1] = s.step
    return s.scores * (1 + bend(0.5)) + offsets.values[2] * moe.randn_like(s.scores)
  end
  run.model.router:hook("pre_topk", f)
  run:train(2)
  local met = calls
  is(met > 0 and #seen == met)
  strength, offsets.values[2], bend = 100, 100, nil         -- what it holds is what was there
  local again = moe.replay(run, { console = false, log = false })
  must_equal(run, again)
  equal(again.last.step, 2)
  equal(calls, 2 * met)
  strength, offsets, bend, seen, calls = nil
end)

test("router: a stored hook may read globals that cannot be stored, in whatever depth and order", function()
  local run = fresh()
  first, odd, table_of_hooks = 1, { { 2, { run } }, "x" }, { f = function(x) return odd and x * first end, g = 3 }
  local h = run.model.router:hook("pre_topk", function(s) return table_of_hooks.f(s.scores) * (odd[2] == "x" and first or 0) end)
  equal(h.active, true)
  run:train(1)
  h:undo()
  first, odd, table_of_hooks = nil
end)

test("router: a stored hook that assigns to an upvalue is refused", function()
  local run, n, inner = fresh(), 0, 0
  local err = raises("usage", function() run.model.router:hook("pre_topk", function(s) n = n + 1 end) end, "upvalue n", "an assignment to it")
  contains(err.hint, "replay = false")
  raises("usage", function() run.model.router:hook("pre_topk", function(s) local function f() inner = s.step end f() end) end, "upvalue inner")
  run.model.router:hook("pre_topk", function(s) n = n + 1 end, { replay = false })
  run:train(1)
  is(n > 0)
end)

test("router: a hook with what cannot be stored is refused, unless replay = false", function()
  local run = fresh()
  local err = raises("usage", function() run.model.router:hook("pre_topk", function(s) return run and s.scores end) end, "upvalue run")
  contains(err.hint, "replay = false")
  local calls = 0
  local h = run.model.router:hook("pre_topk", function(s) calls = calls + (run and 1 or 0) return s.scores end, { replay = false })
  run:train(1)
  equal(calls, 2 * 2)
  raises("state", function() moe.replay(run, { console = false, name = "never" }) end, "replay = false")
  is(not moe.fs.exists(folder .. "/never"), "refused before a run is made")
end)

test("router: bad input is an error each", function()
  local run = fresh()
  local r = run.model.router
  raises("usage", function() r:mask { layer = 1, expert = 6 } end, "0 to 5")
  raises("usage", function() r:mask { layer = 1, expert = -1 } end)
  raises("usage", function() r:mask { layer = 1 } end, "experts")
  raises("usage", function() r:mask { layer = 1, experts = {} } end)
  raises("usage", function() r:mask { layer = 1, expert = "x" } end)
  raises("usage", function() r:mask { layer = 1, experts = { 1, 1 } } end, "twice")
  raises("config", function() r:mask { layer = 0, expert = 1 } end, "router")
  raises("config", function() r:mask { layer = 9, expert = 1 } end)
  local err = raises("usage", function() r:mask { layr = 1, expert = 1 } end, "layr")
  contains(err.hint, "layer")
  raises("usage", function() r:mask(3) end)
  raises("usage", function() r:mask { layer = 1, layers = { 1 }, expert = 1 } end)
  raises("usage", function() r:override {} end)
  raises("usage", function() r:override { top_k = 0 } end)
  raises("usage", function() r:override { temperature = -1 } end)
  raises("usage", function() r:force { layer = 1 } end)
  raises("usage", function() r:swap { layer = 1, experts = { 1 } } end)
  raises("usage", function() r:duplicate { layer = 1, from = 1, to = 1 } end)
  raises("shape", function() r:bias { layer = 1, set = { 1, 2 } } end)
  raises("usage", function() r:bias { layer = 1 } end)
  raises("usage", function() r:hook("mid_topk", function() end) end)
  raises("usage", function() r:hook("pre_topk", 3) end)
  raises("usage", function() r.balance = 3 end)
  raises("usage", function() r.balance = moe.balance.aux { scope = "moon" } end)
  raises("usage", function() moe.balance.aux { alfa = 1 } end, "alfa")
  raises("usage", function() r.nothing = 1 end)
  raises("state", function() run:undo() end)
  run:train(1)
  local _ = r:freeze {}
  run:close()
  raises("state", function() r:mask { layer = 1, expert = 1 } end, "closed")
  equal(#fresh().events, 0)
end)

test("router: the balance strategy is swapped, and taken back", function()
  local run = fresh()
  equal(run.model.router.balance.kind, "aux_free")
  run:train(1)
  run.model.router.balance = moe.balance.aux { alpha = 1e-2, scope = "sequence" }
  local before = run.model:bias(1):clone()
  local m = run:train(1)
  is(m.balance_loss > 1e-3, "balance loss " .. m.balance_loss)
  equal((run.model:bias(1) - before):abs():max():item(), 0)
  equal(run.config.model.moe.sequence_aux_loss_weight, 1e-2)
  run.model.router.balance = moe.balance.aux { alpha = 1e-2, scope = "global" }
  is(run:train(1).balance_loss > 1e-3)
  run:undo() run:undo()
  m = run:train(1)
  equal(m.balance_loss, 0)
  is((run.model:bias(1) - before):abs():max():item() > 0)
  run.model.router.balance = function(counts, bias, m) local d = counts:to("fp64"):mean() - counts:to("fp64") return bias + 0.5 * (d:gt(0):to("fp64") - d:lt(0):to("fp64")) end
  before = run.model:bias(2):clone()
  run:train(1)
  near((run.model:bias(2) - before):abs():max():item(), 0.5, 1e-6)
  run.model.router.balance = moe.balance.none()
  before = run.model:bias(2):clone()
  run:train(1)
  equal((run.model:bias(2) - before):abs():max():item(), 0)
end)

test("router: a model without selection biases gets them from aux_free, and loses them by undo", function()
  local plain = cfg:with { model = { moe = { use_aux_loss_free = false } } }
  local run = fresh { config = plain }
  equal(run.model:bias(1), nil)
  raises("state", function() run.model.router:bias { layer = 1, set = 0 } end)
  run.model.router.balance = moe.balance.aux_free { speed = 0.1 }
  run:train(1)
  near(run.model:bias(1):abs():max():item(), 0.1, 1e-6)
  run:undo()
  equal(run.model:bias(1), nil)
  run:train(1)
end)

test("events: each intervention is one, with step, what, old and new", function()
  local run = fresh { log = true }
  run:train(2)
  local h = run.model.router:mask { layer = 2, expert = 5 }
  run:set { learning_rate = 1e-4 }
  run:train(1)
  h:undo()
  local e = run.events
  contains(tostring(e[1]), "layers = {")
  equal(#e, 3)
  equal(e[1].step, 2) equal(e[1].what, "mask") equal(e[1].args.layers[1], 2) equal(e[1].args.experts[1], 5)
  equal(e[1].new["2"][1], 5) equal(e[1].old, nil)
  equal(e[2].what, "set") equal(e[2].old["training.learning_rate"], 3e-3) equal(e[2].new["training.learning_rate"], 1e-4)
  equal(e[3].event, "undo") equal(e[3].step, 3) equal(e[3].id, e[1].id)
  contains(tostring(e), "mask")
  contains(tostring(e), "undo mask")
  local lines = 0
  for line in io.lines(run.folder .. "/events.jsonl") do
    lines = lines + 1
    is(moe.json.decode(line).id)
  end
  equal(lines, 3)
end)

test("recomputation: hooks run once a decision, and change no bit", function()
  local full = fresh { config = cfg:with { training = { gradient_checkpointing = "full" } } }
  local none = fresh()
  for _, run in ipairs { full, none } do
    run.model.router:hook("pre_topk", function(s) return s.scores + 0.1 * moe.rand_like(s.scores) end)
    run.model.router:hook("post_topk", function(s) return nil, s.weights * (1 + 0.1 * moe.rand_like(s.weights)) end)
    run.model.router.score = function(logits) return (2 * logits):sigmoid() end
    run:train(3)
  end
  must_equal(full, none)
end)

check.done()

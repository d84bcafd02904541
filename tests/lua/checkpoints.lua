-- Saving and resuming from Lua, and what a scheduler's signals do.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, is, raises, contains = check.test, check.equal, check.is, check.raises, check.contains

local folder = check.folder()
local cfg = moe.config {
  output_dir = folder, experiment_name = "small", deterministic = true,
  model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64,
    mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1, bias_update_speed = 0.01 } },
  training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 32, train_steps = 20, learning_rate = 3e-3, save_interval = 10 },
  data = { dataset_type = "synthetic", synthetic = { domains = 3 }, packing = true, preprocessing = { num_workers = 2 } },
}
local function numbers(m) return ("%a %a %a"):format(m.loss, m.grad_norm, m.maxvio) end
local function bias(run) return tostring(run.model:bias(1):to("fp64"):sum():item()) end

test("resume: 10 steps, a save, a new process and 10 more are 20 steps, bit for bit", function()
  local whole, want = moe.run { config = cfg:with { output_dir = folder .. "/whole" }, console = false }, {}
  for step, m in whole:steps(20) do want[step] = numbers(m) end
  local run = moe.run { config = cfg, console = false }
  run:train(10)
  run:save "half"
  run:close()
  moe.fs.write(folder .. "/rest.lua", [[
    local run = moe.resume("half", nil, { output_dir = arg[1], console = false })
    assert(run.step == 10 and run.attempt == 1)
    for step, m in run:steps(10) do print(("%d %a %a %a"):format(step, m.loss, m.grad_norm, m.maxvio)) end
    print("bias " .. run.model:bias(1):to("fp64"):sum():item())]])
  local out, code = check.moelab(("run '%s/rest.lua' '%s'"):format(folder, folder))
  equal(code, 0, out)
  for step = 11, 20 do check.contains(out, step .. " " .. want[step]) end
  check.contains(out, "bias " .. bias(whole))
  is(moe.fs.exists(run.folder .. "/checkpoints/step_20/index.json"))
  local events = moe.fs.read(run.folder .. "/events.jsonl")
  check.contains(events, '"event":"save"')
  check.contains(events, '"event":"resume"')
end)

test("resume: changes, and a run of this session that gives its folder up", function()
  local run = moe.run { config = cfg, console = false }
  run:train(4)
  local path = run:save "mid"
  is(moe.fs.exists(path .. "/index.json"))
  run:train(2)
  local again = moe.resume("mid", { training = { learning_rate = 1e-4 } }, { output_dir = folder, console = false })
  equal(again.step, 4)
  equal(again.attempt, 1)
  equal(again.folder, run.folder)
  equal(again.config.training.learning_rate, 1e-4)
  raises("state", function() run:train(1) end, "run:train: got a closed run", "moe.resume(run)")
  raises("state", function() run:save() end, "run:save: got a closed run")
  contains(run, run.folder .. ", closed")
  is(not tostring(again):find("closed"))
  again:train(2)
  local branch = moe.resume(path, { experiment_name = "branch" }, { console = false })
  is(branch.folder:find("/branch/", 1, true))
  again:train(1)                                     -- goes on: the branch is elsewhere
  equal(moe.resume("last", nil, { output_dir = folder, console = false, log = false }).step, 4)
  equal(moe.run { config = cfg, resume = path, console = false, log = false }.step, 4)
end)

test("resume: a run stands for the newest checkpoint of its folder, and so does the folder", function()
  local run = moe.run { config = cfg, name = "stands", console = false }
  raises("io", function() moe.resume(run) end, "a run without a complete checkpoint", "run:save()")
  run:train(1)
  run:save "one"
  run:train(2)
  run:save "three"
  run:train(1)
  local again = moe.resume(run, nil, { console = false })
  equal(again.step, 3)
  equal(again.folder, run.folder)
  equal(moe.resume(run.folder, nil, { console = false }).step, 3)
  raises("state", function() moe.resume(moe.run { config = cfg, console = false, log = false }) end, "log = false")
end)

test("resume: an unknown name lists what there is, in the session's runs, a folder of runs, and beside a path", function()
  local run = moe.run { config = cfg, name = "listed", console = false }
  local path = run:save "middle"
  run:train(1)
  run:save "later"
  raises("io", function() moe.resume "midle" end, "a run of this session or in ", "later", 'did you mean "middle"?')
  raises("io", function() moe.resume("midle", nil, { output_dir = folder, name = "listed" }) end, "has saved: later, middle", 'did you mean "middle"?')
  raises("io", function() moe.resume(path:gsub("middle$", "midle")) end, "one that is there: middle, later", 'did you mean "middle"?')
end)

test("resume: what cannot be is an error that says why", function()
  raises("io", function() return moe.resume("none", nil, { output_dir = folder }) end, "none")
  raises("io", function() return moe.resume(folder .. "/none") end, "No such file")
  raises("io", function() return moe.resume("last", nil, { output_dir = folder .. "/empty" }) end, "no complete checkpoint")
  raises("usage", function() return moe.resume() end, "what")
  raises("usage", function() return moe.resume("last", nil, { outputdir = folder }) end, 'did you mean "output_dir"?')
  raises("config", function() return moe.resume("mid", { seed = 3, model = { num_layers = 3 } }, { output_dir = folder, console = false }) end, "seed", "model.num_layers")
  raises("config", function() return moe.resume("mid", { training = { use_fp16 = true } }, { output_dir = folder, console = false }) end, "use_fp16: got true", "loss scale", "use_bf16 and use_fp8 may change")
  raises("config", function() return moe.resume("mid", { sed = 3 }, { output_dir = folder }) end, "seed")
  local run = moe.run { config = cfg, console = false, log = false }
  raises("state", function() run:save "x" end, "no folder")
  raises("usage", function() moe.run { config = cfg, console = false }:save "last" end)
  is(moe.fs.exists(run:save(folder .. "/by_path") .. "/index.json"))
end)

test("init_from: weights of a checkpoint, from step 0", function()
  local base = moe.run { config = cfg, console = false }
  base:train(3)
  local run = moe.run { config = cfg:with { training = { init_from = base:save "base" } }, console = false, log = false }
  equal(run.step, 0)
  equal(bias(run), bias(base))
  local a, b = base.model:parameters(), run.model:parameters()
  for name, value in pairs(a) do is(value:allclose(b[name], { atol = 0, rtol = 0 }), name) end
end)

-- A script in the background that gets a signal once it trains; output and exit code.
local function signalled(name, signal, script)
  local path, ready = folder .. "/" .. name .. ".lua", folder .. "/" .. name .. ".ready"
  moe.fs.write(path, script:gsub("READY", ready):gsub("CONFIG", folder .. "/" .. name .. ".json"))
  cfg:with({ experiment_name = name, training = { train_steps = 1000000, save_interval = 1000000 } }):save(folder .. "/" .. name .. ".json")
  return check.interrupted(path, ready, signal)
end

test("signals: TERM, USR1 and an interrupt end a script with 130 after a save", function()
  for signal in ("TERM USR1 INT"):gmatch("%w+") do
    local out, code = signalled("by_" .. signal, signal, [[
      local r = moe.run { config = "CONFIG", console = false }
      r:train(2)
      for step in r:steps() do                   -- an interrupt may come in Lua as well as in a step
        if step == 3 then io.open("READY", "w"):close() end
      end
      print("after step", r.step, r.stopping)]])
    equal(code, 130, out)
    local again = moe.resume("last", nil, { output_dir = folder, name = "by_" .. signal, console = false, log = false })
    is(again.step > 2, signal .. ": step " .. again.step)
    if signal ~= "INT" then check.contains(out, "after step\t" .. again.step .. "\ttrue") end
  end
end)

test("signals: what trains nothing is interrupted", function()
  local path = folder .. "/idle.lua"
  moe.fs.write(path, ("io.open(%q, 'w'):close()\nwhile true do end"):format(folder .. "/idle.ready"))
  local out, code = check.interrupted(path, folder .. "/idle.ready", "TERM")
  equal(code, 130, out)
end)

check.done()

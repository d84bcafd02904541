-- The commands train, check, list and quickstart as a person types them.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, contains = check.test, check.equal, check.near, check.is, check.contains

local folder = check.folder()
local SMALL = {
  output_dir = folder .. "/runs", experiment_name = "small",
  model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64,
    mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1 } },
  training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 32, train_steps = 20, lr_warmup_steps = 10, learning_rate = 3e-3 },
  data = { dataset_type = "synthetic", synthetic = { domains = 3 } },
  validation = { enabled = true, max_batches = 2 },
}
local file = folder .. "/small.json"
moe.config(SMALL):save(file)
local child = folder .. "/child.json"
moe.fs.write(child, '{ "inherits": "small.json", "training": { "learning_rate": 0.5 } }')
local train = "train --config '" .. file .. "' --device cpu "

local function lines_of(text)
  local list = {}
  for line in text:gmatch("[^\n]+") do list[#list + 1] = moe.json.decode(line) end
  return list
end

test("train: three steps log, validate by domain and end with a summary", function()
  local out, code = check.moelab(train .. "--steps 3 --name three training.learning_rate=1e-3")
  equal(code, 0, out)
  for step = 1, 3 do contains(out, ("step: %d loss: "):format(step)) end
  is(not out:find("step: 4 ", 1, true))
  contains(out, "training.learning_rate")
  contains(out, "→ 0.001")
  contains(out, "optimizer state")
  contains(out, "perplexity")
  contains(out, "384 tokens")
  contains(out, "Next:")
  local run = out:match("folder (%S+/three/%d+)")
  is(run, "no folder in " .. out)
  is(moe.fs.exists(run .. "/config.json"))
  local saved = moe.config(run .. "/config.json").training
  equal(saved.train_steps, 3)
  equal(saved.lr_warmup_steps, 3)
  equal(saved.learning_rate, 1e-3)
end)

test("train: a ready configuration without an option, and the file as first word", function()
  local out, code = check.moelab("train '" .. file .. "' --device cpu --steps 1")
  equal(code, 0, out)
  contains(out, "final loss")
end)

test("train: with --json every line is one object", function()
  local out, code = check.moelab(train .. "--steps 3 --json")
  equal(code, 0, out)
  local list = lines_of(out)
  local params = moe.config(file):params()
  equal(list[1].plan.parameters, params.total)
  equal(list[1].plan.active, params.active)
  equal(list[1].plan.steps, 3)
  equal(list[1].plan.tokens, 3 * 4 * 32)
  local m = list[1].plan.memory
  equal(m.weights + m.gradients + m.optimizer + m.activations, m.total)
  local steps = {}
  for _, line in ipairs(list) do
    if line.step then steps[#steps + 1] = line end
  end
  equal(#steps, 3)
  local summary = list[#list].summary
  equal(summary.loss, steps[3].loss)
  equal(summary.tokens, 384)
  equal(summary.skipped, 0)
  equal(#summary.validation.by_domain, 3)
  is(moe.fs.exists(summary.folder))
end)

test("train: on two ranks, once printed", function()
  if not moe.mpi_plugin() or not moe.execute({ "mpirun", "--version" }).found then return end
  local out, code = check.moelab(train .. "-n 2 --threads 1 --steps 2 training.micro_batch_size=1")
  equal(code, 0, out)
  equal(select(2, out:gsub("step: 2 loss", "")), 1, out .. ": log lines")
  contains(out, "2 ranks")
end)

test("train: a dry run shows and makes nothing", function()
  local out, code = check.moelab(train .. "--dry-run --ranks 2 --name dry model.moe.num_experts=8")
  equal(code, 0, out)
  contains(out, "mpirun")
  contains(out, "-n 2")
  is(not out:match("launch: [^\n]*dry%-run"), out)
  contains(out, "expert_intermediate_size")
  contains(out, "of 2 ranks")
  contains(out, "activations")
  is(not moe.fs.exists(folder .. "/runs/dry"))
  local plan = moe.json.decode((check.moelab(train .. "--dry-run --json model.moe.num_experts=8"))).plan
  equal(plan.parameters, moe.config(file):with({ model = { moe = { num_experts = 8 } } }):params().total)
  equal(plan.resolved.model.moe.num_experts, 8)
  equal(#plan.changes, 1)
  equal(plan.changes[1].old, "4")
  equal(plan.changes[1].new, "8")
  contains(plan.launch, "moelab train")
end)

test("train: a file is compared with what it inherits", function()
  local plan = moe.json.decode((check.moelab("train --config '" .. child .. "' --dry-run --json"))).plan
  equal(#plan.changes, 1)
  equal(plan.changes[1].key, "training.learning_rate")
  equal(plan.changes[1].new, "0.5")
end)

test("train: every ready configuration has a dry run of five steps", function()
  for _, name in ipairs(moe.config_names()) do
    local out, code = check.moelab("train --config " .. name .. " --steps 5 --dry-run --json --device cpu data.dataset_type=synthetic")
    equal(code, 0, name .. ": " .. out)
    equal(moe.json.decode(out).plan.parameters, moe.config(name):params().total, name)
  end
end)

test("train: what does not fit is a memory error before anything is built", function()
  for _, name in ipairs { "deepseek_v3_671b", "large" } do
    local out, code = check.moelab("train --config " .. name .. " --steps 5 --device cpu data.dataset_type=synthetic")
    equal(code, 1, out)
    contains(out, "available on this machine")
    contains(out, "GiB for weights, gradients and optimizer state")
    local err = lines_of((check.moelab("--json train --config " .. name .. " --steps 5 --device cpu")))
    equal(err[#err].error.kind, "memory")
  end
end)

test("train: wrong usage names the nearest and exits with 2", function()
  for line, part in pairs {
    ["train --config tinny"] = 'did you mean "tiny"?', ["train --cofig tiny"] = '"--config"', ["train tiny small"] = "key=value", ["train"] = "no configuration",
    ["train --config tiny --steps 0"] = "--steps", ["train --config tiny --steps two"] = 'got "two", want a whole number of 1 or more', ["train --config tiny --ranks 0"] = "--ranks", ["train --config tiny --stesp 5"] = '"--steps"', ["train --config tiny model.moe.num_expert=3"] = "num_experts",
    ["train --config tiny --submit"] = "not built yet", ["train --config tiny --script-only x.sh"] = "not built yet", ["train --config cpu_quick"] = "--steps N",
    ["train --config tiny training.micro_batch_size=0"] = "micro_batch_size", ["list --jsno"] = '"--json"', ["quickstart --chek"] = '"--check"', ["check output=x"] = '"output_dir"',
    ["quickstart --check --list"] = "--check",
  } do
    local out, code = check.moelab(line)
    equal(code, 2, line .. ": " .. out .. ": exit code")
    contains(out, part)
    equal(select(2, out:gsub("error:", "")), 1, line .. ": number of errors")
  end
  for line, want in pairs {
    ["--json train --config tiny --steps two"] = { "moelab --steps", '"two"', "a whole number of 1 or more" },
    ["--json --device tpu list"] = { "moelab --device", '"tpu"', "cpu or cuda" },
    ["--json train --config"] = { "moelab --config", "nothing", "NAME|FILE" },
    ["--json --threads 1 --threads 2 list"] = { "moelab --threads", "2 values", "one" },
    ["--json docs --markdown --html"] = { "moelab", "--html with --markdown", "one of them" },
    ["--json --no-color=x list"] = { "moelab --no-color", '"x"', "no value: it is a flag" },
  } do
    local out, code = check.moelab(line)
    local e = moe.json.decode(out).error
    equal(code, 2, line)
    equal(e.kind, "usage", line)
    equal(e.op, want[1], line)
    equal(e.got, want[2], line)
    equal(e.want, want[3], line)
    equal(e.hint, "--help shows the usage", line)
  end
  local out, code = check.moelab("train --config '" .. folder .. "/none.json'")
  equal(code, 1, out)
  contains(out, "none.json")
end)

test("train: --resume goes on, --init starts from weights", function()
  local whole = lines_of((check.moelab(train .. "--steps 4 --name whole --json")))
  local out, code = check.moelab(train .. "--steps 2 --name part --json")
  equal(code, 0, out)
  local first = lines_of(out)
  equal(first[#first].summary.steps, 2)
  local folder_of_part = first[#first].summary.folder
  out, code = check.moelab("train --device cpu --json --resume '" .. folder_of_part .. "' training.train_steps=4 training.log_interval=1")
  equal(code, 0, out)
  local second = lines_of(out)
  equal(second[1].plan.tokens, 4 * second[1].plan.tokens_per_step)
  equal(#second[1].plan.changes, 1)
  equal(second[1].plan.changes[1].key, "training.train_steps")
  equal(second[1].plan.changes[1].new, "4")
  equal(second[2].step, 3)
  equal(second[#second].summary.steps, 4)
  equal(second[#second].summary.folder, folder_of_part)
  out, code = check.moelab(train .. "--json --name part --resume last --steps 6")
  equal(code, 0, out)
  equal(lines_of(out)[#lines_of(out)].summary.steps, 6)
  -- The same weights as a start: the first loss is what evaluation of them would give, far below that of new ones.
  out, code = check.moelab(train .. "--json --steps 1 --name started --init '" .. folder_of_part .. "'")
  equal(code, 0, out)
  local function first_loss(list)
    for _, line in ipairs(list) do if line.step then return line.loss end end
  end
  is(first_loss(lines_of(out)) < first_loss(whole), "not started from the weights")
  out, code = check.moelab("train --device cpu --resume '" .. folder .. "/none'")
  equal(code, 1, out)
  contains(out, "none")
  out, code = check.moelab("train --device cpu --resume last --dry-run")
  equal(code, 2, out)
end)

test("train: values keep the type of their key", function()
  local plan = moe.json.decode((check.moelab(train .. "--dry-run --json experiment_name=007 model.vocab_size=null training.gradient_checkpointing=selective training.recompute=attention,route"))).plan
  equal(plan.resolved.experiment_name, "007")
  equal(plan.resolved.model.vocab_size, nil)
  equal(table.concat(plan.resolved.training.recompute, " "), "attention route")
end)

test("train: an interrupt ends it with 130", function()
  local script = folder .. "/long.lua"
  moe.fs.write(script, ("moe.become { moe.executable(), 'train', '--config', %q, '--device', 'cpu', '--steps', '1000000', '--name', 'long' }"):format(file))
  local out, code = check.interrupted(script, folder .. "/runs/long")      -- made right before the first step
  equal(code, 130, out)
end)

test("check: a row for each part, and what is needed works", function()
  local out, code = check.moelab("check output_dir='" .. folder .. "'")
  equal(code, 0, out)
  for _, what in ipairs { "processor", "memory", "output_dir", "LibTorch", "GPU", "nvcc", "compiler", "CMake", "Ninja", "mpirun", "MPI plugin", "Slurm", "Python", "Jupyter", "TensorBoard" } do contains(out, what) end
  is(not out:find("\27", 1, true), "colours without a terminal")
  local found = moe.json.decode((check.moelab("quickstart --check --json")))
  is(found.ok)
  is(#found.rows >= 17, #found.rows .. " rows")
  for _, row in ipairs(found.rows) do
    is(row.state == "works" or row.state == "missing" or row.state == "not needed", tostring(row.state))
    is(row.state ~= "missing" or #row.get > 3, row.what .. " has no way to get it")
  end
end)

test("check: a tool that hangs or fails is said to, a folder that cannot be written is an error", function()
  local bin = folder .. "/bin"
  moe.fs.mkdir(bin)
  for name, text in pairs { cmake = "exit 3", ninja = "echo 1.99.1" } do moe.fs.write(bin .. "/" .. name, "#!/bin/sh\n" .. text .. "\n") end
  os.execute(("chmod +x '%s'/*"):format(bin))
  local exe = moe.executable()
  local r = moe.execute({ "env", "PATH=" .. bin .. ":" .. os.getenv("PATH"), exe, "check", "--json" }, { timeout_secs = 120 })
  equal(r.code, 0, r.output)
  local by_name = {}
  for _, row in ipairs(moe.json.decode(r.output).rows) do by_name[row.what] = row end
  equal(by_name.CMake.state, "missing")
  contains(by_name.CMake.found, "failed with 3")
  equal(by_name.Ninja.found, "1.99.1")
  local out, code = check.moelab("check output_dir=/proc/none")
  equal(code, 1, out)
  contains(out, "output_dir missing")
end)

test("execute: output, code, a program that is not there, one that hangs with a child", function()
  local r = moe.execute({ "sh", "-c", "echo one; echo two >&2; exit 7" })
  equal(r.output, "one\ntwo\n")
  equal(r.code, 7)
  is(r.found and not r.timed_out)
  r = moe.execute { "moelab-no-such-program" }
  is(not r.found)
  equal(r.code, 127)
  local clock = moe.clock()
  r = moe.execute({ "sh", "-c", "sleep 60 & echo here; sleep 60" }, { timeout_secs = 0.5 })
  is(r.timed_out)
  equal(r.output, "here\n")
  is(moe.clock() - clock < 20, "took " .. moe.clock() - clock .. " s")
  r = moe.execute({ "sh", "-c", "sleep 60 & echo left" }, { timeout_secs = 30 })
  is(not r.timed_out)
  equal(r.output, "left\n")
  check.raises("usage", function() return moe.execute {} end, "program")
  check.raises("io", function() return moe.become { "moelab-no-such-program" } end, "moelab-no-such-program")
end)

test("program: a wrong option says once what was got", function()
  local out, code = check.moelab "--ranks x -e 1"
  equal(code, 2)
  equal(select(2, out:gsub("got ", "")), 1, out)
  out, code = check.moelab "train --config nowhere"
  equal(code, 2)
  is(not out:find("%.cpp") and not out:find("lua/moe"), out)
end)

test("list: parameters are those of the configurations", function()
  local found = moe.json.decode((check.moelab("list --json")))
  equal(#found.configurations, #moe.config_names())
  for _, c in ipairs(found.configurations) do
    local cfg = moe.config(c.name)
    equal(c.parameters, cfg:params().total, c.name)
    equal(c.active, cfg:params().active, c.name)
    equal(c.layers, cfg.model.num_layers, c.name)
    is(#c.about > 10, c.name .. " has no line")
  end
  local commands = {}
  for _, c in ipairs(found.commands) do commands[c.name] = c.about end
  for _, name in ipairs { "train", "check", "list", "quickstart", "bench", "config", "run" } do is(commands[name] and #commands[name] > 10, name) end
  equal(#found.benchmarks, #moe.benchmarks)
  local out, code = check.moelab("quickstart --list")
  equal(code, 0, out)
  contains(out, "deepseek_v3_671b")
  contains(out, "671.0 B")
end)

test("list: experiments beside the program, each with its first line", function()
  local found = moe.json.decode((check.moelab("list --json"))).experiments
  if not moe.home() then return equal(#found, 0) end
  local names = {}
  for _, e in ipairs(found) do names[e.name] = e end
  contains(names.quickstart.about, "do experts take different domains?")
  is(moe.fs.exists(moe.home() .. "/" .. names.quickstart.file))
  equal(names._template, nil)
end)

test("quickstart: the end of the input before the first answer is an error, not a choice", function()
  local r = moe.execute({ "sh", "-c", ("'%s' --device cpu quickstart < /dev/null 2>&1"):format(moe.executable()) }, { timeout_secs = 60 })
  equal(r.code, 2, r.output)
  contains(r.output, "the end of the input")
end)

test("run: --help of an experiment prints its arguments and runs nothing", function()
  for _, name in ipairs { "_template", "experts_or_dense", "quickstart" } do
    local out, code = check.moelab(("run '%s/experiments/%s/run.lua' --help"):format(moe.home(), name))
    equal(code, 0, out)
    contains(out, "output_dir=outputs")
    is(not out:find("step: ", 1, true), out)
  end
end)

test("quickstart: piped answers choose and fill in, wrong ones are named", function()
  local exe = moe.executable()
  local function answered(text)
    local r = moe.execute({ "sh", "-c", ("cd '%s' && printf '%s' | OMP_NUM_THREADS=2 '%s' --device cpu quickstart"):format(folder, text, exe) }, { timeout_secs = 120 })
    return r.output, r.code
  end
  local out, code = answered("6\\n")
  equal(code, 0, out)
  contains(out, "What shall run?")
  contains(out, "deepseek_v3_671b")
  out, code = answered("4\\n1\\n")
  equal(code, 0, out)
  contains(out, "without")
  contains(out, "MaxVio")
  moe.fs.mkdir(folder .. "/text")
  moe.fs.write(folder .. "/text/a.txt", ("It was a dark and stormy night. "):rep(400))
  out, code = answered("3\\ntext\\n1\\n")
  equal(code, 0, out)
  contains(out, "$ moelab --device=cpu train --config cpu_quick --steps 1 ")
  contains(out, "final loss")
  for text, part in pairs { ["9\\n"] = "a number from 1 to 6", ["x\\n"] = "a number from 1 to 6", ["2\\n0\\n"] = "at least 1" } do
    out, code = answered(text)
    equal(code, 2, out)
    contains(out, part)
  end
  out, code = answered("3\\nnone\\n")
  equal(code, 1, out)
  contains(out, "a folder that exists")
end)

test("help: every command explains itself", function()
  for _, c in ipairs(moe.commands()) do
    local out, code = check.moelab(c.name .. " --help")
    equal(code, 0, out)
    contains(out, "Options")
    is(#c.about > 10, c.name)
  end
  local out = check.moelab("train --help")
  for _, option in ipairs { "--config", "--ranks", "--gpus", "--init", "--resume", "--dry-run", "--steps", "--name", "--json" } do contains(out, option) end
end)

check.done()

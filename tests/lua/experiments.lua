-- The experiments over sweeps: their points are valid, and one of them runs to its report in two steps a point.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, is, contains, raises = check.test, check.equal, check.is, check.contains, check.raises

local experiments = arg[0]:match("^(.*)/") .. "/../../experiments"
local folder = check.folder()

test("experiments: every sweep's points are valid and can be shown without a run", function()
  for name, points in pairs { bias_rate = 12, aux_or_bias = 18, num_experts = 15, shared_experts = 9, ablate_expert = 3 } do
    local out, code = check.moelab(("sweep '%s/%s/run.lua' --dry-run --json output_dir='%s'"):format(experiments, name, folder))
    equal(code, 0, name .. ": " .. out)
    local answer = moe.json.decode(out)
    equal(answer.sweep, name)
    equal(#answer.points, points, name)
    is(moe.fs.exists(("%s/%s/README.md"):format(experiments, name)))
  end
  equal(#moe.fs.list(folder), 0)
end)

test("experiments: what is compared in shared_experts has equal weights and work", function()
  local out = check.moelab(("sweep '%s/shared_experts/run.lua' --dry-run output_dir='%s'"):format(experiments, folder))
  local seen = {}
  for parameters in out:gmatch("waiting.-%s%d+%s+(%d+)%s+300") do seen[parameters] = true end
  local different = {}
  for parameters in pairs(seen) do different[#different + 1] = tonumber(parameters) end
  is(#different >= 1, out)
  table.sort(different)
  is(different[#different] - different[1] <= 3 * 2 * 96, "routers of 16 to 18 rows of 96 weights in three layers are all that may differ: " .. table.concat(different, ", "))
end)

test("experiments: shared_experts runs to its report", function()
  local out, code = check.moelab(("run '%s/shared_experts/run.lua' steps=2 seeds=1 output_dir='%s'"):format(experiments, folder))
  equal(code, 0, out)
  contains(out, "validation_loss")
  contains(moe.fs.read(folder .. "/shared_experts/report.md"), "4 of 18, none shared")
end)

test("experiments: parts written in Lua run, each in under 20 lines", function()
  if not moe.documented()["router:ablate"] then
    print("skipped: no interventions in this build")
    return
  end
  for _, name in ipairs { "router_score", "balance", "schedule", "data", "optimizer" } do
    local file = ("%s/custom_parts/%s.lua"):format(experiments, name)
    is(select(2, moe.fs.read(file):gsub("\n", "")) < 20, name .. " is longer")
    local out, code = check.moelab(("run '%s' steps=3 output_dir='%s'"):format(file, folder))
    equal(code, 0, name .. ": " .. out)
    contains(out, name .. ": loss ")
  end
end)

test("experiments: an unknown argument is an error that names the nearest", function()
  for _, file in ipairs(moe.fs.list(experiments, { recursive = true, suffix = ".lua" })) do
    local name = file:match("experiments/([^/]+/[^/]+)%.lua$")
    if name ~= "quickstart/corpus" then
      local out, code = check.moelab(("run '%s' output_dri=x"):format(file))
      equal(code, 2, name .. ": " .. out)
      contains(out, 'did you mean "output_dir"?')
    end
  end
end)

test("experiments: fp8_or_bf16 says what is wrong with from and seeds before it makes anything", function()
  for words, part in pairs {
    ["from=-1"] = "fp8_or_bf16: from: got -1, want 0 to 9, below steps", ["from=10"] = "fp8_or_bf16: from: got 10, want 0 to 9, below steps", ["from=half"] = "fp8_or_bf16: from: got half, want an integer",
    ["from=0.5"] = "fp8_or_bf16: from: got 0.5, want an integer", ["seeds=0"] = "fp8_or_bf16: seeds: got 0, want 1 or more", ["seeds=two"] = "fp8_or_bf16: seeds: got two, want an integer",
  } do
    local out, code = check.moelab(("run '%s/fp8_or_bf16/run.lua' steps=10 %s output_dir='%s/none'"):format(experiments, words, folder))
    equal(code, 2, words .. ": " .. out)
    contains(out, part)
  end
  is(not moe.fs.exists(folder .. "/none"))
end)

test("experiments: a word without \"=\" is an error that names it, whichever script asks for its options", function()
  local out, code = check.moelab(("run '%s/_template/run.lua' steps 3"):format(experiments))
  equal(code, 2, out)
  contains(out, '"steps", a word without "="')
  contains(out, "steps=3")
  for _, file in ipairs(moe.fs.list(experiments, { recursive = true, suffix = ".lua" })) do
    local text = moe.fs.read(file)
    is(text:find("moe.script_options", 1, true) or not text:find("arg.options", 1, true), file .. " reads arg.options by itself")
  end
  local kept = arg
  for _, case in ipairs { { { "--steps=7" }, "steps=7" }, { { "steps" }, "steps=…" }, { { "x.lua" }, '"x.lua"' } } do
    arg = { [0] = "mine.lua", table.unpack(case[1]) }
    arg.options = { seed = 1 }
    raises("usage", function() moe.script_options({ "steps", "seed" }, "mine") end, "mine: got ", case[2], "one of steps, seed")
  end
  arg = { [0] = "mine.lua", options = { seed = 1 } }
  equal(moe.script_options({ "steps", "seed" }, "mine").seed, 1)
  raises("usage", function() moe.script_options({ "steps" }, "mine") end, '"seed"')
  local with = moe.script_options({ "jobs", seed = 7, steps = 300, name = "x" }, "mine")
  equal(with.seed, 1) equal(with.steps, 300) equal(with.name, "x") equal(with.jobs, nil)
  arg = { [0] = "mine.lua", options = { steps = "x", name = 3 } }
  raises("usage", function() moe.script_options({ "name", steps = 300 }, "mine") end, 'mine: steps: got x, want an integer, such as steps=300')
  equal(moe.script_options({ "steps", name = "x" }, "mine").name, "3")
  arg = kept
end)

test("experiments: the list shows all, those without a run.lua by their files", function()
  local found, names = moe.json.decode((check.moelab "list --json")).experiments, {}
  for _, e in ipairs(found) do
    names[e.name] = e.file
    is(e.about and #e.about > 10, e.name)
    is(moe.fs.exists(experiments .. "/../" .. e.file), e.file)
  end
  equal(names["bias_rate"], "experiments/bias_rate/run.lua")
  equal(names["custom_parts/optimizer"], "experiments/custom_parts/optimizer.lua")
end)

check.done()

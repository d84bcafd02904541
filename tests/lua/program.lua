local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

local folder = check.folder()
local function script(name, text)
  moe.fs.write(folder .. "/" .. name, text)
  return "'" .. folder .. "/" .. name .. "'"
end

test("program: version, help, one line of code", function()
  local out, code = check.moelab("--version")
  equal(code, 0)
  check.contains(out, moe.version)
  out, code = check.moelab("--help")
  equal(code, 0)
  check.contains(out, "run")
  equal(check.moelab("help"), out)
  check.contains((check.moelab("help train")), "Usage: moelab train")
  out, code = check.moelab("< /dev/null")     -- without arguments it reads statements
  equal(out, "")
  equal(code, 0)
  out, code = check.moelab("-e 'print(moe.version)'")
  equal(out, moe.version .. "\n")
  equal((check.moelab [[--json -e '1 + 1, "x", { a = 1 }']]), '{"values":[2,"x","{a = 1}"]}\n')
  equal((check.moelab [[--json -e '"1", "true", nil, true, 1 / 3, 2.0, 0 / 0, -1 / 0, "a\n"']]), '{"values":["1","true",null,true,0.3333333333333333,2.0,"nan","-inf","a\\n"]}\n')
  out = check.moelab("-e '1 + 1'")
  equal(out, "2\n")
end)

test("program: arguments reach the script, converted", function()
  local file = script("args.lua", 'print(arg[1], arg[2], arg.options.n + 1, arg.options.on == true, arg.options["a.b"], math.type(arg.options.x), arg.options.t)')
  local want = "one\t--two\t5\ttrue\ttext\tfloat\t=x\n"
  local out, code = check.moelab("run " .. file .. " one n=4 on=true a.b=text x=1e-3 --two t==x")
  equal(code, 0, out)
  equal(out, want)
  equal(check.moelab(file .. " one --two n=4 on=true a.b=text x=0.5 t==x"), want)
end)

test("program: malformed Lua names file and line", function()
  local out, code = check.moelab("run " .. script("bad.lua", "local a = 1\nlocal b = = 2\n"))
  equal(code, 1)
  check.contains(out, "bad.lua:2")
  check.contains(out, "unexpected symbol")
end)

test("program: errors name the script's line, and its callers", function()
  local out, code = check.moelab("run " .. script("deep.lua", "local function f()\n  return moe.zeros { -1 }\nend\nf()\nprint('no')\n"))
  equal(code, 1)
  check.contains(out, "deep.lua:2")
  is(not out:find("no\n", 1, true) or not out:find("^no\n"))
  out, code = check.moelab("run " .. script("plain.lua", "\n\nlocal x = nil + 1\n"))
  equal(code, 1)
  check.contains(out, "plain.lua:3")
  out, code = check.moelab("run " .. script("table.lua", "error({ 1 })"))
  equal(code, 1)
end)

test("program: wrong usage names the nearest and exits with 2", function()
  for line, part in pairs {
    ["rnu x"] = 'did you mean "run"?', ["--devise cpu -e 1"] = 'did you mean "--device"?', ["bench cpu_quik_train"] = 'did you mean "cpu_quick_train"?',
    ["config tinny"] = "tiny", ["config tiny model.moe.num_expert=3"] = "num_experts", ["bench cpu_quick_train step=3"] = 'did you mean "steps"?',
    ["bench cpu_quick_train dtype=bf61"] = 'did you mean "bf16"?',
    ["run --rank 2 x.lua"] = '--ranks', ["config tiny --key"] = '--keys', ["--device gpu -e 1"] = "gpu", ["run"] = "no file",
  } do
    local out, code = check.moelab(line)
    equal(code, 2, line .. ": " .. out .. ": exit code")
    check.contains(out, part)
    equal(select(2, out:gsub("error:", "")), 1, line .. ": number of errors")
  end
end)

test("program: a file that is not there", function()
  local out, code = check.moelab("run " .. folder .. "/none.lua")
  equal(code, 1)
  check.contains(out, "none.lua")
end)

test("program: errors as JSON", function()
  local out, code = check.moelab("--json run " .. script("json.lua", "moe.zeros({ 1 }, { dtype = 'bf61' })"))
  equal(code, 1)
  local err = moe.json.decode(out).error
  equal(err.kind, "dtype")
  check.contains(err.hint, "bf16")
  check.contains(err.where, "json.lua:1")
end)

test("program: config prints a tree, keys and JSON", function()
  local out, code = check.moelab("config tiny model.moe.num_experts=16")
  equal(code, 0)
  check.contains(out, "num_experts")
  check.contains(out, "parameters:")
  check.contains(check.moelab("config --keys"), "model.moe.capacity_factor")
  equal(moe.json.decode((check.moelab("config tiny --json"))).model.moe.num_experts, 4)
end)

test("program: an interrupt ends plain loops, pcall loops and coroutines with 130", function()
  for _, code in ipairs {
    "while true do end",
    "while true do pcall(function() while true do end end) end",
    "coroutine.wrap(function() while true do end end)()",
    "while true do moe.sleep(5) end",
  } do
    script("loop.lua", ("io.open(%q, 'w'):close()\n"):format(folder .. "/ready") .. code)
    local out, status = check.interrupted(folder .. "/loop.lua", folder .. "/ready")
    equal(status, 130, code .. ": " .. out)
    check.contains(out, "interrupted")
  end
end)

test("program: unwritable and missing folders", function()
  raises("io", function() return moe.fs.list(folder .. "/none") end, "none")
  raises("io", function() return moe.fs.mkdir("/proc/none") end)
  raises("io", function() return moe.fs.write("/proc/none/x", "x") end)
  raises("io", function() return moe.fs.size(folder .. "/none") end)
end)

test("program: its end while a job trains stops the job after a step and saves it", function()
  local folder = check.folder()
  local script = folder .. "/leave.lua"
  local out = io.open(script, "w")
  out:write(([[
    local run = moe.run { console = false, name = "left", config = { output_dir = "%s", seed = 3, model = { num_layers = 2, vocab_size = 64, first_k_dense_replace = 1, dense_intermediate_size = 32,
      mla = { d_model = 16, d_latent = 8, num_heads = 2, qk_nope_head_dim = 4, qk_rope_head_dim = 4, v_head_dim = 4 }, moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 8, num_shared_experts = 1 } },
      training = { global_batch_size = 2, micro_batch_size = 2, seq_length = 8, train_steps = 100000 }, data = { dataset_type = "synthetic" } } }
    local job = run:start()
    while job.step < 3 do moe.sleep(0.005) end
  ]]):format(folder))
  out:close()
  local text, code = check.moelab("run '" .. script .. "'")
  equal(code, 0, text)
  check.contains(text, "which is saved")
  local again = moe.resume("last", nil, { name = "left", output_dir = folder, console = false })
  is(again.step >= 3, again.step)
  again:close()
end)

check.done()

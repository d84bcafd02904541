-- moelab quickstart [--check | --list]: asks what to run, then runs it.

--- The answer to a question; an empty line, and the end of input (an error with needs_line), take the default.
local function ask(question, default, needs_line)
  moe.write(("%s [%s]: "):format(question, default))
  local line = io.read("l")
  if needs_line and not line then
    print()
    moe.fail { op = "quickstart", got = "the end of the input", want = "answers", hint = "run it in a terminal, or give the answers on standard input" }
  end
  if not line or not moe.is_terminal() then print(line or default) end
  line = line and line:match("^%s*(.-)%s*$") or ""
  return line == "" and tostring(default) or line
end

local function ask_number(question, default, most, needs_line)
  local text = ask(question, default, needs_line)
  local n = math.tointeger(tonumber(text))
  if not n or n < 1 or (most and n > most) then
    moe.fail { op = "quickstart: " .. question, got = '"' .. text .. '"', want = most and ("a number from 1 to %d"):format(most) or "a whole number of at least 1" }
  end
  return n
end

--- This process becomes the command, which a person could as well have typed.
local function become(words, given)
  if given.device then table.insert(words, 1, "--device=" .. given.device) end
  local text = "moelab"
  for _, word in ipairs(words) do text = text .. " " .. (word:find("[^%w%-_./=]") and "'" .. word:gsub("'", "'\\''") .. "'" or word) end
  print("\n$ " .. text)
  table.insert(words, 1, moe.executable())
  moe.become(words)
end

local function experiment(given)
  local home = moe.home()
  local file = home and home .. "/experiments/quickstart/run.lua"
  if not file or not moe.fs.exists(file) then
    moe.fail { kind = "io", op = "quickstart", got = "no experiments/quickstart/run.lua around this program", want = "the source tree or the unpacked archive", hint = "choose another, or start moelab from there" }
  end
  become({ "run", file }, given)
end

local function tiny(given)
  become({ "train", "--config", "tiny", "--steps", tostring(ask_number("steps", 5)), "data.dataset_type=synthetic" }, given)
end

local function own_text(given)
  local folder = ask("folder of text files (a subfolder a domain)", "experiments")
  if not moe.fs.exists(folder) then moe.fail { kind = "io", op = "quickstart: folder", got = folder, want = "a folder that exists" } end
  local steps = ask_number("steps", 200)
  become({ "train", "--config", "cpu_quick", "--steps", tostring(steps), "--name", "own_text", "data.dataset_type=text", "data.path=" .. folder, "model.vocab_size=null" }, given)
end

--- The same model and data with and without the balancing bias.
local function compare()
  local steps, rows = ask_number("steps", 60), {}
  for i, on in ipairs { true, false } do
    local cfg = moe.config("cpu_quick"):with { training = { train_steps = steps, global_batch_size = 8, micro_batch_size = 8, log_interval = 1000000 }, data = { dataset_type = "synthetic" },
      model = { moe = { use_aux_loss_free = on, bias_update_speed = 0.02, bias_update_rule = "magnitude" } } }
    local run <close> = moe.run { config = cfg, log = false, console = false }
    local label = on and "with the bias" or "without"
    local bar, last = moe.progress(steps, { label = label }), nil
    for step, m in run:steps() do
      last = m
      bar:update(step, ("loss %.3f  maxvio %.2f"):format(m.loss, m.maxvio))
    end
    bar:done()
    rows[i] = { label, last.loss, last.maxvio }
  end
  print(moe.table(rows, { title = ("\nThe last of %d steps; MaxVio 0 is perfect balance"):format(steps), titles = { "balance", "loss", "MaxVio" }, formats = { false, "%.4f", "%.2f" } }))
end

local function run_command(name) return function() require("moe.commands." .. name)({}, {}, {}, {}) end end

local MENU = {
  { "the quickstart experiment: five domains of this machine's files, about two minutes", experiment },
  { "train the tiny configuration for some steps on synthetic data", tiny },
  { "train a small model on your own folder of text", own_text },
  { "compare training with and without the balancing bias", compare },
  { "check this machine", run_command "check" },
  { "list configurations, experiments and commands", run_command "list" },
}

return function(words, options, given, assignments)
  if given.check or given.list then return require("moe.commands." .. (given.check and "check" or "list"))(words, options, given, assignments) end
  moe.check_keys(options, {}, "quickstart: options")
  print("What shall run?")
  for i, item in ipairs(MENU) do print(("  %d  %s"):format(i, item[1])) end
  local number = ask_number("number", 1, #MENU, true)
  MENU[number][2](given)
end

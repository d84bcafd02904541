-- moelab list [--json]: ready configurations, experiments, benchmarks and commands.
local function configurations()
  local list = {}
  for i, name in ipairs(moe.config_names()) do
    local cfg = moe.config(name)
    local p, m = cfg:params(), cfg.model
    list[i] = { name = name, layers = m.num_layers, d_model = m.mla.d_model, experts = m.moe.num_experts, top_k = m.moe.num_experts_per_token,
      parameters = p.total, active = p.active, about = moe.config_about(name) }
  end
  return list
end

-- An experiment is a folder with a README.md, whose first line says what it asks, and a run.lua; without one each of its Lua files is, and its first line
-- says what it does. "_template" is none.
local function experiments()
  local list, home = {}, moe.home()
  if not home then return list end
  for _, file in ipairs(moe.fs.list(home .. "/experiments", { recursive = true, suffix = "/README.md" })) do
    local name = file:sub(#home + #"/experiments/" + 1):match("^([^/]+)/README%.md$")
    local folder = name and "experiments/" .. name
    if folder and name:sub(1, 1) ~= "_" and moe.fs.exists(home .. "/" .. folder .. "/run.lua") then
      local heading, rest = moe.fs.read(file):match("^#*%s*([^\n]*)\n*([^\n]*)")
      local line = heading == name and rest or heading:gsub("^" .. name .. ":%s*", "")
      list[#list + 1] = { name = name, about = line, file = folder .. "/run.lua" }
    elseif folder and name:sub(1, 1) ~= "_" then
      for _, part in ipairs(moe.fs.list(home .. "/" .. folder, { suffix = ".lua" })) do
        list[#list + 1] = { name = name .. "/" .. part:match("([^/]+)%.lua$"), about = moe.fs.read(part):match("^%-%-%s*([^\n]*)") or "", file = folder .. "/" .. part:match("[^/]+$") }
      end
    end
  end
  return list
end

-- What the program and its launcher know besides the files of this folder.
local OTHERS = {
  { name = "run", usage = "moelab run [--ranks N] FILE.lua [key=value …]", about = "runs an experiment." },
  { name = "build", usage = "./moelab build", about = "configures and builds (the launcher's)." },
  { name = "package", usage = "./moelab package", about = "one archive for other machines (the launcher's)." },
  { name = "test", usage = "./moelab test [FILTER]", about = "runs the tests (the launcher's)." },
}

local function commands()
  local list = moe.commands()
  for _, c in ipairs(OTHERS) do list[#list + 1] = c end
  table.sort(list, function(a, b) return a.name < b.name end)
  return list
end

local function benchmarks()
  local list = {}
  for i, b in ipairs(moe.benchmarks) do list[i] = { name = b.name, about = b.about } end
  return list
end

local function show(found)
  local rows = {}
  for i, c in ipairs(found.configurations) do
    rows[i] = { c.name, c.layers, c.d_model, ("%d / %d"):format(c.experts, c.top_k), moe.format_count(c.parameters), moe.format_count(c.active), c.about }
  end
  print(moe.table(rows, { title = "Configurations (moelab config NAME shows one, moelab train --config NAME trains it)",
    titles = { "name", "layers", "d", "experts / top-k", "parameters", "active", "what it is" } }))
  local function section(title, list, first)
    local lines = {}
    for i, item in ipairs(list) do lines[i] = { item[first], item.about } end
    print()
    print(#lines > 0 and moe.table(lines, { title = title }) or title .. "\nnone found beside this program")
  end
  section("Experiments (moelab run FILE)", found.experiments, "file")
  section("Benchmarks (moelab bench NAME)", found.benchmarks, "name")
  section("Commands (moelab NAME --help explains one)", found.commands, "name")
end

return function(words, options, given)
  moe.check_keys(options, {}, "list: options")
  local found = { configurations = configurations(), experiments = experiments(), benchmarks = benchmarks(), commands = commands() }
  if given.json then
    print(moe.json.encode(found))
  else
    show(found)
  end
end

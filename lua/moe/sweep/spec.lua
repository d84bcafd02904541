-- What moe.sweep was asked for, as a list of points: every combination of grid, list and random values, each with its resolved configuration.
local carry, hash = require "moe.sweep.carry", require "moe.sweep.hash"
local spec = {}

local KEYS = { "name", "base", "fn", "grid", "list", "seeds", "random", "halving", "ranks", "output_dir", "about", "metric" }
local HALVING = { "budgets", "keep", "by", "key", "over", "largest" }
local ALWAYS_LEFT_OUT = { "output_dir", "experiment_name" }     -- where a run is written says nothing of what it is

local function wrong(what, got, want, hint) moe.fail { op = "moe.sweep: " .. what, got = got, want = want, hint = hint } end

local function is_list(value) return type(value) == "table" and #value > 0 end

local function check_values(what, values)
  if not is_list(values) then wrong(what, type(values) == "table" and "no values" or type(values), "a list of values") end
  for i, v in ipairs(values) do
    local kind = type(v)
    if kind == "function" or kind == "thread" or (kind == "userdata" and v ~= moe.null) then wrong(("%s: value %d"):format(what, i), kind, "numbers, texts, true, false, moe.null or tables of them") end
  end
  return values
end

-- --- values ---

local function sorted_keys(of)
  local keys = {}
  for key in pairs(of) do
    if type(key) ~= "string" then wrong("key", tostring(key), "a key of the configuration, such as \"training.learning_rate\"") end
    keys[#keys + 1] = key
  end
  -- Seeds vary fastest: repetitions of one setting stand together.
  table.sort(keys, function(a, b)
    if (a == "seed") ~= (b == "seed") then return b == "seed" end
    return a < b
  end)
  return keys
end

local function grid_points(grid)
  local points = { {} }
  for _, key in ipairs(sorted_keys(grid)) do
    local longer = {}
    for _, point in ipairs(points) do
      for _, v in ipairs(check_values("grid: " .. key, grid[key])) do
        local copy = { [key] = v }
        for k, old in pairs(point) do copy[k] = old end
        longer[#longer + 1] = copy
      end
    end
    points = longer
  end
  return points
end

local function draw(key, range, u)
  local what = "random: space: " .. key
  if type(range) ~= "table" then wrong(what, type(range), "{low, high, log = true}, or {values = {…}}") end
  local low, high = range[1], range[2]
  if range.values or not (#range == 2 and type(low) == "number" and type(high) == "number") then
    local values = check_values(what, range.values or range)
    return values[1 + math.floor(u * #values)]
  end
  local options = {}
  for name, v in pairs(range) do
    if type(name) == "string" then options[name] = v end
  end
  moe.check_keys(options, { "log", "values" }, "moe.sweep: " .. what)
  if not (low < high) or (range.log and low <= 0) then
    wrong(what, ("{%s, %s}"):format(low, high), range.log and "0 < low < high" or "low < high", "two numbers are a range; for a choice of two write { values = { … } }")
  end
  local whole = math.type(low) == "integer" and math.type(high) == "integer"
  if range.log then
    local v = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return whole and math.max(low, math.min(high, math.floor(v + 0.5))) or v
  end
  return whole and low + math.floor(u * (high - low + 1)) or low + u * (high - low)
end

-- Each value depends on seed, key and its number only: more points, or further keys, leave those that are there as they are.
local function random_points(random)
  moe.check_keys(random, { "n", "seed", "space" }, "moe.sweep: random")
  local n, seed = random.n, random.seed or 1
  if math.type(n) ~= "integer" or n < 1 then wrong("random: n", tostring(n), "how many points, 1 or more") end
  if type(random.space) ~= "table" then wrong("random: space", type(random.space), "{key = {low, high}, …}") end
  local points, keys = {}, sorted_keys(random.space)
  if #keys == 0 then wrong("random: space", "nothing", "{key = {low, high}, …}") end
  for i = 1, n do
    points[i] = {}
    for _, key in ipairs(keys) do points[i][key] = draw(key, random.space[key], hash.uniform(("%s/%s/%d"):format(seed, key, i))) end
  end
  return points
end

local function list_points(list)
  if not is_list(list) then wrong("list", type(list) == "table" and "no points" or type(list), "a list of {key = value, …}") end
  for i, point in ipairs(list) do
    if type(point) ~= "table" or #point > 0 then wrong(("list: point %d"):format(i), type(point) == "table" and "a list" or type(point), "{key = value, …}") end
    for key, v in pairs(point) do check_values(("list: point %d: %s"):format(i, tostring(key)), { v }) end
  end
  return list
end

-- All combinations of two lists of points, the second fastest.
local function product(a, b)
  local points = {}
  for _, x in ipairs(a) do
    for _, y in ipairs(b) do
      local point = {}
      for k, v in pairs(x) do point[k] = v end
      for k, v in pairs(y) do
        if point[k] ~= nil then wrong("key", ('"%s" twice'):format(k), "each key in one of grid, list and random") end
        point[k] = v
      end
      points[#points + 1] = point
    end
  end
  return points
end

-- --- configurations ---

local function read_halving(h)
  moe.check_keys(h, HALVING, "moe.sweep: halving")
  check_values("halving: budgets", h.budgets)
  for i, b in ipairs(h.budgets) do
    if type(b) ~= "number" or (i > 1 and b <= h.budgets[i - 1]) then wrong("halving: budgets", moe.json.encode(h.budgets), "growing numbers") end
  end
  local keep = h.keep or 0.5
  if type(keep) ~= "number" or keep <= 0 or keep >= 1 then wrong("halving: keep", tostring(keep), "the share that goes on after each round, between 0 and 1") end
  return { budgets = h.budgets, keep = keep, by = h.by, key = h.key or "training.train_steps", over = h.over or "seed", largest = h.largest }
end

local function value_text(v) return type(v) == "string" and v or v == moe.null and "null" or type(v) == "table" and moe.json.encode(v) or math.type(v) == "float" and ("%.6g"):format(v) or tostring(v) end

--- "learning_rate 0.001, seed 2": the point's values with the last part of their keys.
function spec.describe(keys, values)
  local parts = {}
  for _, key in ipairs(keys) do
    if values[key] ~= nil then parts[#parts + 1] = ("%s %s"):format(key:match("[^.]+$"), value_text(values[key])) end
  end
  return #parts > 0 and table.concat(parts, ", ") or "the base"
end
spec.value_text = value_text

--- The point of these values with a budget (nil: none): id and resolved configuration. Raises what the configuration has to say.
function spec.resolve(s, values, budget)
  local cfg
  if s.make_config then
    local copy = {}
    for k, v in pairs(values) do copy[k] = v end
    cfg = moe.config(s.make_config(copy))
    if values.seed ~= nil then cfg = cfg:with { seed = values.seed } end
  else
    cfg = s.base
  end
  local changes = {}
  if not s.make_config then
    for k, v in pairs(values) do changes[k] = v end
  end
  if budget then changes[s.halving.key] = budget end
  if next(changes) then cfg = cfg:with(changes) end
  cfg:validate()
  local whole = cfg:to_table()
  for _, key in ipairs(ALWAYS_LEFT_OUT) do whole[key] = nil end
  local id = hash.id(moe.json.encode { whole, s.make_config and values or moe.null, s.fn_text, s.ranks })
  return { id = id:sub(1, 12), values = values, config = cfg, budget = budget }
end

--- Reads and checks the options of moe.sweep. Gives {name, folder, base, make_config, fn, fn_text, trains, keys, candidates, halving, ranks, about, metric}.
function spec.read(given, default_fn)
  if type(given) ~= "table" then wrong("options", type(given), "{name =, base =, grid = {…}, …}") end
  moe.check_keys(given, KEYS, "moe.sweep: options")
  local s = { about = given.about, metric = given.metric, ranks = given.ranks or 1, fn = given.fn or default_fn, trains = given.fn == nil }
  s.name = given.name
  if type(s.name) ~= "string" or s.name == "" or s.name:find("[/%c]") or s.name:sub(1, 1) == "." then wrong("name", tostring(s.name), "a name for the sweep's folder, without \"/\"") end
  if type(s.fn) ~= "function" or debug.getinfo(s.fn, "S").what == "C" then wrong("fn", type(s.fn), "a Lua function(point, run_options) that returns a table of results") end
  if math.type(s.ranks) ~= "integer" or s.ranks < 1 then wrong("ranks", tostring(s.ranks), "processes of each point, 1 or more") end
  if given.base == nil then wrong("base", "nothing", "a configuration, its name, or a function(values) that makes one", "moe.config_names() lists the ready ones") end
  if type(given.base) == "function" then
    s.make_config = given.base
  else
    s.base, s.base_name = moe.config(given.base), type(given.base) == "string" and given.base or nil
  end
  s.fn_text = given.fn and carry.text(given.fn) or "train 1"
  if given.halving then s.halving = read_halving(given.halving) end
  local points = { {} }
  if given.list then points = product(points, list_points(given.list)) end
  if given.random then points = product(points, random_points(given.random)) end
  if given.grid then points = product(points, grid_points(given.grid)) end
  if given.seeds then
    if math.type(given.seeds) ~= "integer" or given.seeds < 1 then wrong("seeds", tostring(given.seeds), "how many seeds, 1 or more") end
    local seeds = {}
    for i = 1, given.seeds do seeds[i] = { seed = i } end
    points = product(points, seeds)
  end
  local seen = {}
  for _, point in ipairs(points) do
    for key in pairs(point) do seen[key] = true end
  end
  s.keys, s.candidates = sorted_keys(seen), points
  s.output_dir = given.output_dir or (s.base and s.base.output_dir) or "outputs"
  s.folder = s.output_dir .. "/" .. s.name
  return s
end

--- All points of all budgets; everything that is wrong with them is one error. Equal ones are there once.
function spec.points(s)
  local rounds, problems, count = {}, {}, 0
  for r, budget in ipairs(s.halving and s.halving.budgets or { false }) do
    local seen = {}
    rounds[r] = {}
    for _, values in ipairs(s.candidates) do
      local ok, point = pcall(spec.resolve, s, values, budget or nil)
      if not ok then
        if type(point) == "table" and point.kind == "interrupted" then error(point, 0) end
        count = count + 1
        if count <= 5 then problems[#problems + 1] = ("%s%s: %s"):format(spec.describe(s.keys, values), budget and (" with %s %s"):format(s.halving.key, budget) or "", tostring(point)) end
      elseif not seen[point.id] then
        seen[point.id], point.round = true, r
        rounds[r][#rounds[r] + 1] = point
      end
    end
  end
  if count > 0 then
    moe.fail { kind = "config", op = ("moe.sweep \"%s\""):format(s.name), got = ("%d point%s that cannot run: %s%s"):format(count, count == 1 and "" or "s", table.concat(problems, "; "), count > 5 and "; …" or ""),
      want = "configurations that are valid and built" }
  end
  return rounds
end

return spec

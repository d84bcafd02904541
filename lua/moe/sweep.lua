-- moe.sweep { … }: many runs that differ in a few keys, and what came of them.
local spec, store, runner, metrics = require "moe.sweep.spec", require "moe.sweep.store", require "moe.sweep.runner", require "moe.sweep.metrics"
local session = require "moe.sweep.session"

local MOST_PRINTED = 20
local Sweep = { __name = "sweep" }
local methods = {}

-- --- points ---

-- Mean of the metric over the points that differ in `over` only (a seed); failed ones lose, and those with a result that is not finite.
local function ranked(s, points)
  local h, groups, by_key = s.halving, {}, {}
  local metric = metrics.objective(s)
  for _, p in ipairs(points) do
    local rest = {}
    for _, key in ipairs(s.keys) do
      if key ~= h.over then rest[#rest + 1] = key .. "=" .. spec.value_text(p.values[key] == nil and moe.null or p.values[key]) end
    end
    local key = table.concat(rest, "\0")
    if not by_key[key] then
      by_key[key] = { points = {}, sum = 0.0, place = #groups + 1 }
      groups[#groups + 1] = by_key[key]
    end
    local g = by_key[key]
    local value = p.result and p.result[metric]
    if p.result and type(value) ~= "number" then
      moe.fail { op = "moe.sweep: halving: by", got = ("no number \"%s\" in the result of point %s"):format(metric, p.id), want = "a number at every point", hint = "fn may give 0 / 0 where there is none" }
    end
    g.points[#g.points + 1] = p
    g.sum = g.sum + (value and value - value == 0 and (h.largest and -value or value) or math.huge)
  end
  for _, g in ipairs(groups) do g.mean = g.sum / #g.points end
  table.sort(groups, function(a, b) return a.mean < b.mean or (a.mean == b.mean and a.place < b.place) end)
  return groups
end

-- The points of all rounds that can be named now: of a round of halving the best of the one before, once all of that have ended.
local function known_points(s)
  local list, round = {}, s.rounds[1]
  for r = 1, #s.rounds do
    local ended = true
    for _, p in ipairs(round) do
      list[#list + 1] = p
      ended = ended and p.status ~= "waiting"
    end
    if r == #s.rounds or not ended then break end
    local groups, next_round = ranked(s, round), {}
    local by_id, kept = {}, {}
    for g = 1, math.max(1, math.ceil(#groups * s.halving.keep - 1e-9)) do
      for _, p in ipairs(groups[g].points) do kept[p.values] = true end
    end
    for _, p in ipairs(s.rounds[r + 1]) do
      if kept[p.values] then next_round[#next_round + 1] = p end
    end
    round = next_round
  end
  for i, p in ipairs(list) do p.index = i end
  return list
end

local function count(s)
  local c = { total = 0, done = 0, failed = 0, waiting = 0 }
  for _, p in ipairs(known_points(s)) do c.total, c[p.status] = c.total + 1, c[p.status] + 1 end
  return c
end

local function most_points(s)
  local total, groups = 0, #s.rounds[1]
  for r = 1, #s.rounds do
    total = total + groups
    groups = s.halving and math.max(1, math.ceil(groups * s.halving.keep - 1e-9)) or groups
  end
  return total
end

function methods.points(self)
  local list = {}
  for i, p in ipairs(known_points(self.spec)) do
    list[i] = { id = p.id, index = i, status = p.status, values = p.values, budget = p.budget, round = p.round, config = p.config, result = p.result, error = p.error, secs = p.secs,
      path = store.path(self.folder, p.id) }
  end
  return list
end

-- One line: how many points there are, and what became of them.
local function status(self)
  local c = count(self.spec)
  return ("sweep %s: %d point%s, %d done, %d failed, %d to run"):format(self.name, c.total, c.total == 1 and "" or "s", c.done, c.failed, c.waiting)
end

-- --- running ---

methods.status = status

function methods.check(self)
  local rows, s = {}, self.spec
  for i, p in ipairs(known_points(s)) do
    local row = { id = p.id, status = p.status }
    for _, key in ipairs(s.keys) do row[key] = p.values[key] end
    row.parameters, row.steps, row.tokens = p.config:params().total, p.config:num_steps { ranks = s.ranks }, p.config:num_tokens { ranks = s.ranks }
    row.memory_gib = p.config:memory({ ranks = s.ranks }).total / 2 ^ 30
    if s.halving then row.budget = p.budget end
    rows[i] = row
  end
  local columns = { "id", "status" }
  if s.halving then columns[3] = "budget" end
  for _, key in ipairs(s.keys) do columns[#columns + 1] = key end
  table.move({ "parameters", "steps", "tokens", "memory_gib" }, 1, 4, #columns + 1, columns)
  return moe.table(rows, { columns = columns, titles = self:titles(), formats = { memory_gib = "%.2f" } })
end

local function waiting_points(s)
  local list = {}
  for _, p in ipairs(known_points(s)) do
    if p.status == "waiting" then list[#list + 1] = p end
  end
  return list
end

-- All that is known now, so that what was planned can be read beside what has run.
local function write_waiting(s)
  moe.on(0, function() moe.fs.mkdir(s.folder .. "/points") end)
  local found
  repeat
    found = false
    for _, p in ipairs(known_points(s)) do
      if p.status == "waiting" then
        if store.refresh(s.folder, p) then found = true          -- another session ran it meanwhile: a round of halving may begin
        else store.write(s.folder, s.name, p) end
      end
    end
  until not found
  moe.on(0, function()
    if s.script and moe.fs.exists(s.script) then moe.fs.write(s.folder .. "/script.lua", moe.fs.read(s.script)) end
  end)
end

function methods.run(self, options)
  options = moe.check_keys(options or {}, { "jobs", "retry", "limit" }, "sweep:run: options")
  local s, jobs = self.spec, session.jobs or options.jobs or (self.spec.ranks > 1 and 1 or 0)
  for name, least in pairs { jobs = 0, limit = 0 } do
    local v = name == "jobs" and jobs or options[name]
    if v ~= nil and (math.type(v) ~= "integer" or v < least) then moe.fail { op = "sweep:run: " .. name, got = tostring(v), want = ("a whole number of %d or more"):format(least) } end
  end
  if jobs == 0 and s.ranks > 1 then moe.fail { op = "sweep:run: jobs", got = ("0 with ranks = %d"):format(s.ranks), want = "jobs = 1 or more", hint = "points of several ranks are processes of their own" } end
  if jobs > 0 and moe.num_ranks > 1 then moe.fail { op = "sweep:run: jobs", got = "a program of several ranks", want = "one rank", hint = "ranks = N in moe.sweep starts each point on N ranks" } end
  if session.dry then error(session.dry_end, 0) end
  for _, p in ipairs(known_points(s)) do
    if options.retry and p.status == "failed" then
      p.status, p.error, p.result = "waiting", nil, nil
      store.write(s.folder, s.name, p)
    end
  end
  write_waiting(s)
  local before, left = count(s), options.limit or math.huge
  if not session.quiet and before.waiting > 0 and left > 0 then print(("%s; folder %s"):format(status(self), s.folder)) end
  local silent = { update = function() end, done = function() end }
  local nothing = session.quiet or #waiting_points(s) == 0 or left == 0
  local bar = nothing and silent or moe.progress(math.min(most_points(s) - before.done - before.failed, left), { label = s.name })
  local function done()
    local now = count(s)
    return now.done + now.failed - before.done - before.failed
  end
  local points = waiting_points(s)
  while #points > 0 and left > 0 do                  -- a round of halving after the other
    if #points > left then points = table.move(points, 1, left, 1, {}) end
    local start = done()
    runner.run(s, points, { jobs = jobs, bar = bar, done = done })
    left = left - #points
    if done() == start then break end                -- none has ended: their processes were stopped from outside
    write_waiting(s)
    points = waiting_points(s)
  end
  bar:update(done(), "")
  bar:done(("%d failed"):format(count(s).failed - before.failed))
  return self
end

-- --- results ---

-- The result that is shown where none is named, among those that are there.
local function main_result(s, seen)
  for _, name in ipairs { s.metric or "validation_loss", "loss" } do
    if seen[name] then return name end
  end
end

function methods.titles(self)
  local titles, taken = {}, {}
  for _, key in ipairs(self.spec.keys) do
    local short = key:match("[^.]+$")
    taken[short] = (taken[short] or 0) + 1
  end
  for _, key in ipairs(self.spec.keys) do
    local short = key:match("[^.]+$")
    titles[key] = taken[short] == 1 and short or key
  end
  return titles
end

function methods.table(self, wanted)
  if wanted ~= nil and wanted ~= "done" and wanted ~= "failed" and wanted ~= "waiting" then
    moe.fail { op = "sweep:table", got = tostring(wanted), want = "\"done\", \"failed\", \"waiting\", or nothing for all" }
  end
  local s, rows, columns, results, seen = self.spec, {}, { "id", "status" }, {}, {}
  for _, p in ipairs(known_points(s)) do
    if not wanted or p.status == wanted then
      local row = { id = p.id, status = p.status, secs = p.secs, budget = p.budget, error = p.error and p.error.text }
      for _, key in ipairs(s.keys) do
        local v = p.values[key]
        row[key] = type(v) == "table" and moe.json.encode(v) or v
      end
      for name, v in pairs(p.result or {}) do
        if type(v) ~= "table" and row[name] == nil and name ~= "folder" then
          row[name] = v
          if not seen[name] then results[#results + 1], seen[name] = name, true end
        end
      end
      rows[#rows + 1] = row
    end
  end
  if s.halving then columns[#columns + 1] = "budget" end
  for _, key in ipairs(s.keys) do columns[#columns + 1] = key end
  local main = main_result(s, seen)
  columns[#columns + 1] = "secs"
  table.sort(results)
  for _, name in ipairs(results) do
    if name ~= main then columns[#columns + 1] = name end
  end
  columns[#columns + 1] = main
  for _, row in ipairs(rows) do
    if row.error then
      columns[#columns + 1] = "error"
      break
    end
  end
  return moe.table(rows, { columns = columns, titles = self:titles(), formats = { secs = "%.1f" } })
end

function methods.group(self, keys) return self:table("done"):group(keys) end

local function fail_without_points(self, op) moe.fail { kind = "state", op = op, got = status(self), want = "a point that is done", hint = "sweep:run()" } end

function methods.metric(self)
  local seen, known = {}, {}
  for _, column in ipairs(self:table("done").columns) do seen[column] = true end
  if self.spec.metric then metrics.check(self.spec, self.spec.metric, "moe.sweep: metric") end
  if main_result(self.spec, seen) then return main_result(self.spec, seen) end
  for _, p in ipairs(known_points(self.spec)) do
    for name, v in pairs(p.result or {}) do
      if type(v) == "number" then known[#known + 1] = name end
    end
  end
  table.sort(known)
  if not known[1] then fail_without_points(self, "sweep: metric") end
  return known[1]
end

function methods.settings(self)
  local keys = {}
  for _, key in ipairs(self.spec.keys) do
    if key ~= "seed" then keys[#keys + 1] = key end
  end
  if self.spec.halving then table.insert(keys, 1, "budget") end
  return keys
end

-- Misspelt names are told before it is said that nothing has run yet (check_points).
local function check_names(self, names, op)
  local columns = { "secs", "budget", table.unpack(self.keys) }
  for _, name in ipairs(type(names) == "table" and names or { names }) do metrics.check(self.spec, name, op, columns) end
end
local function check_points(self, op)
  if count(self.spec).done == 0 then fail_without_points(self, op) end
end

function methods.agg(self, names)
  check_names(self, names, "sweep:agg")
  check_points(self, "sweep:agg")
  return self:group(self:settings()):agg(names or { self:metric() })
end

function methods.plot(self, options)
  check_names(self, options and options.y, "sweep:plot: y")
  check_points(self, "sweep:plot")
  return require "moe.sweep.report".plot(self, options or {})
end

function methods.report(self, options)
  options = options or {}
  moe.check_keys(options, { "plots", "metrics", "path" }, "sweep:report: options")
  check_names(self, options.metrics, "sweep:report: metrics")
  for _, plot in ipairs(options.plots or {}) do check_names(self, plot.y, "sweep:report: plots") end
  check_points(self, "sweep:report")
  return require "moe.sweep.report".write(self, options)
end

function methods.submit() moe.fail { kind = "config", op = "sweep:submit", got = "submit", want = "sweep:run { jobs = N }", hint = "submission to a cluster comes with clusters" } end

-- --- the object ---

Sweep.__index = function(self, key)
  if methods[key] then return methods[key] end
  local known = { "spec", "name", "folder", "keys" }
  for name in pairs(methods) do known[#known + 1] = name end
  moe.check_keys({ [tostring(key)] = true }, known, "sweep: method or field")
end
Sweep.__len = function(self) return #known_points(self.spec) end
Sweep.__tostring = function(self)
  local c, out = count(self.spec), { status(self) }
  if c.done + c.failed == 0 then return out[1] end
  local t = self:table()
  if #t > MOST_PRINTED then
    out[3] = ("… %d more; :table() is all of them"):format(#t - MOST_PRINTED)
    t = moe.table(table.move(t.rows, 1, MOST_PRINTED, 1, {}), { columns = t.columns, titles = t.options.titles, formats = t.options.formats })
  end
  out[2] = tostring(t)
  local report = self.folder .. "/report.md"
  out[#out + 1] = moe.fs.exists(report) and "report: " .. report or c.done > 0 and "no report yet: :report() writes " .. report or nil
  return table.concat(out, "\n")
end

-- The file of the script that calls moe.sweep.
local function calling_script()
  for level = 3, 20 do
    local info = debug.getinfo(level, "S")
    if not info then return nil end
    if info.what ~= "C" and info.source:sub(1, 1) == "@" and not info.source:find("^@lua/moe/") then return info.source:sub(2) end
  end
end

local function make(given)
  local s = spec.read(given, require "moe.sweep.train")
  s.rounds, s.script = spec.points(s), calling_script()
  for _, round in ipairs(s.rounds) do
    for _, p in ipairs(round) do
      p.status = "waiting"
      store.refresh(s.folder, p)
    end
  end
  metrics.check_all(s)
  local made = setmetatable({ spec = s, name = s.name, folder = s.folder, keys = s.keys }, Sweep)
  session.made[#session.made + 1] = made
  return made
end

local TEXTS = {
  check = "sweep:check(): a table of all points known now: id, status, values, parameters, steps, tokens and memory (GiB, of the fullest rank). Runs nothing.",
  run = "sweep:run {jobs = 0, retry = false, limit =}: writes all points, then runs those without a result: one after the other here (jobs = 0), or as N processes of this program, which share its threads. A point that fails keeps its error and the others go on; "
    .. "retry = true runs failed ones again. limit: at most so many now. An interrupt ends it; what is done stays done, and the next call goes on. With jobs, fn and what it holds on to (numbers, texts, tables, configurations, Lua functions) are sent to the processes. Returns sweep.",
  points = "sweep:points(): a list of {id, index, status (\"waiting\", \"done\", \"failed\"), values, budget, round, config, result, error, secs, path}; with halving those of the rounds that have begun.",
  table = "sweep:table(status): a table with a row a point: id, status, values, secs, results (the sweep's metric last) and errors; all points, or those \"done\", \"failed\" or \"waiting\".",
  group = "sweep:group {keys}: table:group of the points that are done: :agg { \"loss\" } gives a row of each group.",
  agg = "sweep:agg {\"loss\", …}: mean, standard deviation (_std), half the 95 % confidence interval (_ci, Student's t) and n of the finite values over the seeds of each setting (nan of none; NAME_n where it differs from n); by default of the sweep's metric.",
  plot = "sweep:plot {x =, y =, by =, categories = false, title =, log_x =, log_y =, y_min =, y_max =, width =, height =}: y (a result) against x (a key) with the 95 % confidence interval over the seeds, one curve for each value of by; bars where x is no number, or with categories = true. Defaults: the keys in their order, the sweep's metric.",
  report = "sweep:report {plots = {{x =, y =, by =}, …}, metrics = {…}, path =}: writes <folder>/report.md: what was asked and varied, results with confidence intervals, pictures (SVG beside it), failures, configuration against the base, commit, script, hardware and time. Returns its path.",
  submit = "sweep:submit(…): for clusters; not built yet.",
  metric = "sweep:metric(): the result that agg, plot and report show unless told otherwise: metric of moe.sweep, else validation_loss, else loss.",
  status = "sweep:status(): a line with the number of points that are done, failed and still to run.",
  settings = "sweep:settings(): the keys that vary, without the seed.",
  titles = "sweep:titles(): the last part of each key that varies, as a title of its column.",
}
for name, text in pairs(TEXTS) do moe.document(methods[name], "sweep:" .. name, text) end
Sweep.__methods = methods
moe.document(Sweep, "sweep", "sweep: points of moe.sweep { … }, and what came of them. Fields: name, folder, keys; #sweep is the number of points; print(sweep) shows their state, results and the report's path, sweep:status() the state in one line.")

return moe.document(make, "moe.sweep",
  "moe.sweep {name =, base =, grid =, list =, random =, seeds =, halving =, fn =, ranks = 1, metric =, about =, output_dir =}: many runs of base (a configuration, its name, or a function(values) that makes one) with other values; sweep:run() runs what is missing.\n"
  .. "grid = {[\"training.learning_rate\"] = {1e-3, 3e-3}, seed = {1, 2, 3}}: all combinations; list = {{key = value, …}, …}: these; random = {n = 20, seed = 1, space = {key = {low, high, log = true}, other = {values = {…}}}}: draws, whole numbers between whole bounds; seeds = 3: each with seed 1, 2, 3. Given together they are combined.\n"
  .. "halving = {budgets = {100, 300}, keep = 0.5, by = \"loss\", key = \"training.train_steps\", over = \"seed\", largest = false}: all points with the first budget, the better part (mean over `over`; what is not finite counts as worst) with the next, each from the start.\n"
  .. "fn(point, run_options) returns a table of results; by default it trains (require \"moe.sweep.train\"). metric and halving.by are names of numbers among them: a misspelt one is an error here where the sweep trains by itself, else once the first point has ended (what it gave is kept). point: {id, values, config, budget, progress = function(share, text)}; moe.run(run_options) is a run of the point.\n"
  .. "Points lie in <output_dir>/<name>/points/<id>.json. The id follows from the resolved configuration and from fn's source with what it holds on to, so that only what is missing runs, also after changes of the lists.\n"
  .. "Example: print(moe.sweep { name = \"lr\", base = \"tiny\", seeds = 2, grid = { [\"training.learning_rate\"] = { 1e-3, 3e-3 } } })")

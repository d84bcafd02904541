-- What a sweep found: pictures, and a page of Markdown that can stand alone.
local spec, store = require "moe.sweep.spec", require "moe.sweep.store"
local report = {}

-- --- pictures ---

local function all_numbers(values)
  for _, v in ipairs(values) do
    if type(v) ~= "number" then return false end
  end
  return true
end

local function distinct(list)
  local seen, out = {}, {}
  for _, v in ipairs(list) do
    local key = type(v) .. tostring(v)
    if not seen[key] then out[#out + 1], seen[key] = v, true end
  end
  return out
end

-- x, y and by of a picture: what was asked, else the settings in their order.
local function axes_of(sweep, options)
  moe.check_keys(options, { "x", "y", "by", "categories", "title", "x_label", "y_label", "log_x", "log_y", "y_min", "y_max", "width", "height" }, "sweep:plot: options")
  local t, keys = sweep:table("done"), sweep:settings()
  local y = options.y or sweep:metric()
  local x = options.x
  if not x then
    for _, key in ipairs(keys) do
      if not x and key ~= options.by and all_numbers(t:column(key)) then x = key end
    end
    for _, key in ipairs(keys) do
      if not x and key ~= options.by then x = key end
    end
  end
  if not x then moe.fail { op = "sweep:plot: x", got = "only seeds vary", want = "a key that varies", hint = "sweep:agg() shows mean and spread" } end
  local by = options.by
  if by == nil then
    for _, key in ipairs(keys) do
      if key ~= x and by == nil then by = key end
    end
  end
  return t, x, y, by
end

-- Evenly spread in the logarithm rather than as they are: learning rates and the like.
local function wants_log(values)
  local low, high = math.huge, 0
  for _, v in ipairs(values) do
    if v <= 0 then return false end
    low, high = math.min(low, v), math.max(high, v)
  end
  return high >= 30 * low
end

-- Curves over a key of numbers, dots and whiskers where each value was tried.
local function curves(groups, x, y, name_of, options)
  local series = {}
  for first, rows in groups:each() do
    local s = { name = name_of(first), x = {}, y = {}, error = {}, whiskers = true, markers = true }
    for _, row in ipairs(rows:sort(x).rows) do
      if row[y] then
        local i = #s.x + 1
        s.x[i], s.y[i], s.error[i] = row[x], row[y], row[y .. "_ci"] or 0
      end
    end
    series[#series + 1] = s
  end
  return viz.line(series, options)
end

-- A group of bars for each value of a key of names, in order of appearance.
local function bars(groups, x, xs, y, name_of, options)
  local series, place = {}, {}
  options.categories, options.values = {}, "%.4g"
  for i, v in ipairs(xs) do
    options.categories[i] = spec.value_text(v)
    place[options.categories[i]] = i
  end
  for first, rows in groups:each() do
    local s = { name = name_of(first), y = {}, error = {} }
    for i = 1, #xs do s.y[i], s.error[i] = 0 / 0, 0 end
    for _, row in ipairs(rows.rows) do
      local i = place[spec.value_text(row[x])]
      if row[y] then s.y[i], s.error[i] = row[y], row[y .. "_ci"] or 0 end
    end
    series[#series + 1] = s
  end
  return viz.bars(series, options)
end

function report.plot(sweep, options)
  local t, x, y, by = axes_of(sweep, options)
  local titles = sweep:titles()
  local agg = t:group(by and { by, x } or { x }):agg { y }
  local groups = agg:group(by and { by } or {})
  local function name_of(first) return by and ("%s %s"):format(titles[by] or by, spec.value_text(first[by])) or y end
  local drawn = { title = options.title, x_label = options.x_label or titles[x] or x, y_label = options.y_label or y, log_y = options.log_y, width = options.width, height = options.height, y_min = options.y_min, y_max = options.y_max }
  local xs = distinct(agg:column(x))
  if options.categories or not all_numbers(xs) then return bars(groups, x, xs, y, name_of, drawn) end
  drawn.log_x = options.log_x
  if drawn.log_x == nil then drawn.log_x = wants_log(xs) end
  return curves(groups, x, y, name_of, drawn)
end

-- --- the page ---

local function processor()
  local text = moe.fs.exists("/proc/cpuinfo") and moe.fs.read("/proc/cpuinfo") or ""
  local _, n = text:gsub("\nprocessor%s*:", "")
  return ("%s, %d threads of it used"):format(text:match("model name%s*:%s*([^\n]+)") or "unknown processor", moe.num_threads()), n
end

local function hardware(devices)
  local list = { (processor()) }
  for _, device in ipairs(devices) do
    if device == "cuda" then
      for _, g in ipairs(moe.gpus()) do list[#list + 1] = g.name end
      break
    end
  end
  return table.concat(list, "; ")
end

-- "2.994 ± 0.012": as many digits as the interval allows.
local function with_interval(mean, half)
  if mean == nil then return "" end
  if mean ~= mean then return "nan" end
  if half == nil or half ~= half or half == math.huge then return ("%.5g"):format(mean) end
  local digits = half > 0 and math.max(0, math.min(6, 1 - math.floor(math.log(half, 10)))) or 4
  return ("%%.%df ± %%.%df"):format(digits, digits):format(mean, half)
end

local function metrics_of(sweep, options)
  if options.metrics then return type(options.metrics) == "table" and options.metrics or { options.metrics } end
  local list, wanted = { sweep:metric() }, {}
  for _, column in ipairs(sweep:table("done").columns) do wanted[column] = true end
  for _, name in ipairs { "validation_loss", "loss", "maxvio", "tokens_per_sec" } do
    if wanted[name] and name ~= list[1] then list[#list + 1] = name end
  end
  return list
end

local function result_table(sweep, metrics)
  local keys, titles = sweep:settings(), sweep:titles()
  local agg, rows = sweep:table("done"):group(keys):agg(metrics), {}
  for i, row in ipairs(agg.rows) do
    local out = { n = row.n }
    for _, key in ipairs(keys) do out[key] = row[key] end
    for _, m in ipairs(metrics) do
      local n = row[m .. "_n"]
      out[m] = with_interval(row[m], row[m .. "_ci"]) .. (row[m] and n ~= row.n and n > 0 and (" (n = %d)"):format(n) or "")
    end
    rows[i] = out
  end
  local columns = table.move(keys, 1, #keys, 1, {})
  for _, m in ipairs(metrics) do columns[#columns + 1] = m end
  columns[#columns + 1] = "n"
  return moe.table(rows, { columns = columns, titles = titles })
end

local function any_finite(sweep, metric) return #moe.statistics.finite(sweep:table("done"):column(metric)) > 0 end

-- A sentence on the points of which a metric is nan or infinite, "" where there is none.
local function divergences(sweep, metrics)
  local rows, odd = sweep:table("done").rows, 0
  for _, row in ipairs(rows) do
    local stayed = true
    for _, m in ipairs(metrics) do
      local v = row[m]
      stayed = stayed and (type(v) ~= "number" or v - v == 0)
    end
    if not stayed then odd = odd + 1 end
  end
  return odd > 0 and ("%d of %d points did not stay finite: such values are in no mean and not in n, and nan stands where a setting has no others.\n\n"):format(odd, #rows) or ""
end

local function base_section(sweep)
  local s = sweep.spec
  if not s.base then return "The configurations are made by a function of the values (script.lua)." end
  local rows, default = {}, moe.config {}
  local function compare(a, b, path)
    for key, v in pairs(a) do
      local name, old = path .. key, b and b[key]
      if type(v) == "table" and #v == 0 and next(v) then
        compare(v, type(old) == "table" and old or nil, name .. ".")
      elseif moe.json.encode(v) ~= moe.json.encode(old == nil and moe.null or old) then
        rows[#rows + 1] = { key = name, default = old == nil and "null" or spec.value_text(old), here = spec.value_text(v) }
      end
    end
  end
  compare(s.base:to_table(), default:to_table(), "")
  return ("Base: %s. What it changes of the defaults:\n\n%s"):format(s.base_name or "a configuration of the script", moe.table(rows, { columns = { "key", "default", "here" } }):markdown())
end

local function varied_section(sweep)
  local rows = {}
  for i, key in ipairs(sweep.keys) do
    local values = {}
    for _, p in ipairs(sweep.spec.candidates) do values[#values + 1] = spec.value_text(p[key] == nil and moe.null or p[key]) end
    values = distinct(values)
    local shown = table.concat(values, ", ", 1, math.min(#values, 12)) .. (#values > 12 and (" and %d more"):format(#values - 12) or "")
    local base = "null"
    if sweep.spec.base then base = moe.help_text(sweep.spec.base, key) and sweep.spec.base:to_table() end
    if type(base) == "table" then
      for part in key:gmatch("[^.]+") do base = type(base) == "table" and base[part] or nil end
      base = base == nil and "null" or spec.value_text(base)
    end
    rows[i] = { key = key, base = sweep.spec.base and base or "", values = shown }
  end
  if #rows == 0 then return "Nothing varies.\n" end
  return moe.table(rows, { columns = { "key", "base", "values" } }):markdown()
end

local function failures(points)
  local rows = {}
  for _, p in ipairs(points) do
    if p.status == "failed" then rows[#rows + 1] = { id = p.id, error = p.error.text or "", where = p.error.where or "" } end
  end
  return #rows > 0 and "\n## Failed\n" .. moe.table(rows, { columns = { "id", "error", "where" } }):markdown() or ""
end

local function totals(points)
  local secs, done, failed, waiting, commits, devices, last = 0, 0, 0, 0, {}, {}, 0
  for _, p in ipairs(points) do
    secs = secs + (p.secs or 0)
    if p.status == "done" then done = done + 1 elseif p.status == "failed" then failed = failed + 1 else waiting = waiting + 1 end
    commits[#commits + 1], devices[#devices + 1], last = p.commit, p.device, math.max(last, p.finished or 0)
  end
  return { secs = secs, done = done, failed = failed, waiting = waiting, commits = distinct(commits), devices = distinct(devices), last = last }
end

function report.write(sweep, options)
  local path = options.path or sweep.folder .. "/report.md"
  local folder, stem = path:match("^(.*)/[^/]*$") or ".", path:match("([^/]+)%.md$")
  if not stem then moe.fail { op = "sweep:report: path", got = path, want = "a path that ends in .md" } end
  local raw, known = {}, sweep:points()
  for i, p in ipairs(known) do
    local file = p.status ~= "waiting" and store.read(sweep.folder, p.id) or {}
    raw[i] = { id = p.id, status = p.status, secs = p.secs, error = p.error, commit = file.commit, device = file.device, finished = file.finished }
  end
  local t = totals(raw)
  local metrics = metrics_of(sweep, options)
  local out = { "# " .. sweep.name }
  local function add(text) out[#out + 1] = text end
  if sweep.spec.about then add(sweep.spec.about) end
  add(("%d points done, %d failed, %d to run; %s in all, %s a point. %s, LibTorch %s, commit %s, device %s, %s."):format(t.done, t.failed, t.waiting, moe.format_secs(t.secs), moe.format_secs(t.secs / (t.done + t.failed)),
    os.date("!%Y-%m-%d", t.last), moe.torch_version, table.concat(t.commits, ", "), table.concat(t.devices, ", "), hardware(t.devices)))
  add("\n## What varied\n" .. varied_section(sweep))
  add("## Results\nMean ± half the 95 % confidence interval (Student's t) over n runs of each setting.\n\n" .. divergences(sweep, metrics) .. result_table(sweep, metrics):markdown())
  local plots = options.plots
  if not plots then
    plots = {}
    for i, m in ipairs(metrics) do
      if i <= 2 and #sweep:settings() > 0 and any_finite(sweep, m) then plots[#plots + 1] = { y = m } end
    end
  end
  moe.on(0, function() moe.fs.mkdir(folder) end)
  for i, p in ipairs(plots) do
    local name = ("%s-%d.svg"):format(stem, i)
    local picture = report.plot(sweep, p)
    moe.on(0, function() picture:save(folder .. "/" .. name) end)
    add(("![%s](%s)\n"):format(p.title or p.y or metrics[1], name))
  end
  add(failures(raw))
  add("\n## Configuration\n" .. base_section(sweep))
  if sweep.spec.script then add(("Script: %s, copied to `script.lua`.\n"):format("`" .. sweep.spec.script:match("[^/]+$") .. "`")) end
  add("## Points\n" .. sweep:table():markdown())
  local text = table.concat(out, "\n") .. "\n"
  moe.on(0, function() moe.fs.write(path, text) end)
  return path
end

return report

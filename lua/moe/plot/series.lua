-- What users give to plots: series of numbers from tables, tensors and labelled arrays, checked.
local axes = require "moe.plot.axes"
local colours = require "moe.plot.colours"

local series = {}
local finite = axes.finite

-- A list of numbers from a table, a tensor or a labelled array.
function series.numbers(values, op)
  if series.is_values(values) then values = values:to_table() end
  if type(values) ~= "table" then moe.fail { op = op, got = type(values), want = "a list of numbers or a tensor" } end
  for i = 1, #values do
    if type(values[i]) ~= "number" then moe.fail { kind = "shape", op = op .. ", value " .. i, got = type(values[i]), want = "a number" } end
  end
  return values
end

local OPTIONS = { "title", "x_label", "y_label", "log_x", "log_y", "width", "height", "x_min", "x_max", "y_min", "y_max", "events", "levels", "legend", "x_grid" }

-- True for a tensor or a labelled array.
function series.is_values(x) return type(x) == "userdata" or type(x) == "table" and rawget(x, "tensor") ~= nil end

-- Options and list of series of f(list, options) or f { series…, options… }; `more` are further names of options.
function series.arguments(given, options, op, more)
  if series.is_values(given) then given, options = { { y = given } }, options or {} end
  if type(given) ~= "table" then moe.fail { op = op, got = type(given), want = "a list of series {{name =, y =}, …}" } end
  local named = {}
  for key, value in pairs(options or given) do
    if type(key) == "string" and not (options == nil and key == "series") then named[key] = value end
  end
  local known = { table.unpack(OPTIONS) }
  for _, key in ipairs(more or {}) do known[#known + 1] = key end
  moe.check_keys(named, known, op .. ": options")
  for _, key in ipairs { "x_min", "x_max", "y_min", "y_max" } do
    if named[key] ~= nil and type(named[key]) ~= "number" then moe.fail { op = op .. ": " .. key, got = type(named[key]), want = "a number" } end
  end
  for key, what in pairs { events = "x", levels = "y" } do
    for i, mark in ipairs(named[key] or {}) do
      if type(mark) == "number" then named[key][i] = { [what] = mark }
      elseif type(mark) ~= "table" or type(mark[what]) ~= "number" then moe.fail { op = ("%s: %s %d"):format(op, key, i), got = type(mark), want = ("{%s = number, text =}"):format(what) } end
    end
  end
  local list = given.series or given
  if type(list) ~= "table" then moe.fail { op = op .. ": series", got = type(list), want = "a list of series" } end
  if type(list[1]) == "number" then list = { { y = list } } end
  local out = {}
  for i, s in ipairs(list) do out[i] = (type(s) ~= "table" or series.is_values(s)) and { y = s } or s end
  return out, named
end

local KEYS = { "name", "x", "y", "low", "high", "error", "colour", "dashed", "markers", "whiskers", "width", "size", "labels" }

-- One series as {name, colour, dash, points = {{x, y, low, high, label}, …}}; points that are not finite, or not above 0 on a log axis, are left out.
function series.read(s, i, op, options)
  local place = ("%s: series %d"):format(op, i)
  moe.check_keys(s, KEYS, place)
  if s.y == nil then moe.fail { op = place .. ": y", got = "nil", want = "a list of numbers or a tensor" } end
  local y = series.numbers(s.y, place .. ": y")
  local x = s.x and series.numbers(s.x, place .. ": x")
  if x and #x ~= #y then moe.fail { kind = "shape", op = place, got = ("%d x and %d y"):format(#x, #y), want = "as many x as y" } end
  local bounds = {}
  for _, key in ipairs { "low", "high", "error" } do
    bounds[key] = s[key] and series.numbers(s[key], place .. ": " .. key)
    if bounds[key] and #bounds[key] ~= #y then moe.fail { kind = "shape", op = place .. ": " .. key, got = #bounds[key] .. " values", want = #y .. " as y has" } end
  end
  if (bounds.low == nil) ~= (bounds.high == nil) then moe.fail { op = place, got = bounds.low and "low without high" or "high without low", want = "both, or error" } end
  if s.labels ~= nil and type(s.labels) ~= "table" then moe.fail { op = place .. ": labels", got = type(s.labels), want = "a list of texts, one a point" } end
  if s.labels and #s.labels ~= #y then moe.fail { kind = "shape", op = place .. ": labels", got = #s.labels .. " labels", want = #y .. ", one a point" } end
  local out = { name = s.name and tostring(s.name), colour = s.colour or colours.of(i), dash = s.dashed and { 6, 4 } or nil, points = {}, markers = s.markers, whiskers = s.whiskers, width = s.width, size = s.size,
    has_interval = (bounds.low or bounds.error) ~= nil }
  for k = 1, #y do
    local p = { x = x and x[k] or k, y = y[k], label = s.labels and s.labels[k] and tostring(s.labels[k]) }
    if out.has_interval then
      p.low, p.high = bounds.low and bounds.low[k] or y[k] - bounds.error[k], bounds.high and bounds.high[k] or y[k] + bounds.error[k]
      if not finite(p.low) or not finite(p.high) then p.low, p.high = p.y, p.y end
      if options.log_y and p.low <= 0 then p.low = p.y end
    end
    if finite(p.x) and finite(p.y) and (not options.log_y or p.y > 0) and (not options.log_x or p.x > 0) then out.points[#out.points + 1] = p end
  end
  return out
end

return series

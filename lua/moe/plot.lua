-- Plots as SVG and PNG, without a display: lines with bands, scatter, bars, histograms, heat maps, small multiples. moe.plot is also called viz.
local axes = require "moe.plot.axes"
local colours = require "moe.plot.colours"
local heat = require "moe.plot.heat"
local layout = require "moe.plot.layout"
local series = require "moe.plot.series"
local xy = require "moe.plot.xy"

local plot = {}
local finite = axes.finite

-- An axis over what each(f) gives, within options' limits.
local function axis(each, options, key, fallback)
  local low, high = xy.range(each, options["log_" .. key])
  if not low then
    if not fallback then return nil end
    low, high = fallback[1], fallback[2]
  end
  local a = { low = low, high = high, log = options["log_" .. key] or nil, label = options[key .. "_label"] and tostring(options[key .. "_label"]) }
  for _, side in ipairs { "low", "high" } do
    local limit = options[key .. (side == "low" and "_min" or "_max")]
    if limit then
      if a.log and limit <= 0 then moe.fail { op = ("plot: %s_%s"):format(key, side == "low" and "min" or "max"), got = tostring(limit), want = "above 0 on a log axis" } end
      a[side], a["fixed_" .. side] = limit, true
    end
  end
  if a.fixed_low and a.fixed_high and a.low >= a.high then moe.fail { op = "plot: limits of " .. key, got = ("%g to %g"):format(a.low, a.high), want = "the lower one first" } end
  if a.high < a.low then if a.fixed_low then a.high = a.low else a.low = a.high end end
  return a
end

local function each_point(layers, ...)
  local keys = { ... }
  return function(f)
    for _, layer in ipairs(layers) do
      for _, p in ipairs(layer.points) do
        for _, key in ipairs(keys) do f(p[key]) end
      end
    end
  end
end

local function widen(a, share)
  if a.log then
    local by = (a.high / a.low) ^ share
    if not a.fixed_low then a.low = a.low / by end
    if not a.fixed_high then a.high = a.high * by end
  else
    local by = (a.high - a.low) * share
    if not a.fixed_low then a.low = a.low - by end
    if not a.fixed_high then a.high = a.high + by end
  end
end

local function picture_of(panel, options)
  panel.events, panel.levels, panel.x_grid = options.events, options.levels, options.x_grid
  panel.clip_y = options.y_min ~= nil or options.y_max ~= nil
  if not options.height then panel.height = 290 end
  return layout.picture({ panel }, { title = options.title, width = options.width or 720, height = options.height, legend = options.legend })
end

local function read_layers(list, options, op, kind)
  local layers, legend = {}, {}
  for i, s in ipairs(list) do
    local layer = series.read(s, i, op, options)
    layer.type = kind
    layers[i] = layer
    legend[i] = { name = layer.name or #list > 1 and "series " .. i or nil, colour = layer.colour, dash = layer.dash, mark = kind == "points" and "dot" or layer.has_interval and not layer.whiskers and "band" or "line" }
  end
  return layers, legend
end

local function lines_or_points(given, options, op, kind)
  local list, o = series.arguments(given, options, op)
  local layers, legend = read_layers(list, o, op, kind)
  local x, y = axis(each_point(layers, "x"), o, "x"), axis(each_point(layers, "y", "low", "high"), o, "y")
  if not x then moe.fail { op = op, got = "no finite points", want = "at least one series {name =, x =, y =} with points" } end
  y.round = true
  if kind == "points" then widen(x, 0.04) end
  x.is_count = true
  each_point(layers, "x")(function(v) x.is_count = x.is_count and v == math.floor(v) end)
  return picture_of(xy.panel { layers = layers, legend = legend, x = x, y = y, x_grid = kind == "points" }, o)
end

-- Named in the signatures, which completion reads.
local OPTIONS = "title =, x_label =, y_label =, log_x =, log_y =, x_min =, x_max =, y_min =, y_max =, width = 720, height =, legend =, events =, levels ="
local COMMON = "legend = false: no legend; events = {{x =, text =}, …} are vertical lines, levels = {{y =, text =}, …} horizontal ones. Options may also be a table of their own, behind the list of series. Returns a plot: p:save \"x.svg\" or \"x.png\", p.svg, p:png()."

function plot.line(given, options) return lines_or_points(given, options, "viz.line", "line") end
moe.document(plot.line, "viz.line",
  "viz.line {series, …, " .. OPTIONS .. "}: curves. A series is {name = \"train\", x = {…}, y = {…}}: x defaults to 1, 2, …; lists, tensors and labelled arrays will do; points that are not finite are left out. It may have error = {…} (half a width) or low and high: "
  .. "a band around it, or bars with whiskers = true; dashed, markers, colour = \"#rrggbb\", width. " .. COMMON
  .. "\nExample: print(viz.line({ { name = \"loss\", y = { 3, 2, 1.5 }, error = { 0.3, 0.2, 0.1 } } }, { x_label = \"step\", log_y = true }))")

function plot.scatter(given, options) return lines_or_points(given, options, "viz.scatter", "points") end
moe.document(plot.scatter, "viz.scatter",
  "viz.scatter {series, …, " .. OPTIONS .. "}: a dot for each point. A series is {name =, x = {…}, y = {…}}; it may have labels = {…} (texts beside dots), error or low and high, size (radius), colour. " .. COMMON
  .. "\nExample: print(viz.scatter { { x = { 1, 2, 3 }, y = { 2, 1, 4 }, labels = { \"a\", \"b\", \"c\" } } })")

function plot.bars(given, options)
  local list, o = series.arguments(given, options, "viz.bars", { "categories", "values" })
  if #list == 0 then moe.fail { op = "viz.bars", got = "no series", want = "at least one {name =, y = {…}}" } end
  local layers, legend = read_layers(list, o, "viz.bars", "bars")
  local categories = o.categories
  if categories == nil then
    categories = {}
    for i = 1, #series.numbers(list[1].y, "viz.bars: y") do categories[i] = i end
  end
  if type(categories) ~= "table" or #categories == 0 then moe.fail { op = "viz.bars: categories", got = type(categories) == "table" and "none" or type(categories), want = "a list of names" } end
  for i, layer in ipairs(layers) do
    local n = #series.numbers(list[i].y, "viz.bars: y")
    if n ~= #categories then moe.fail { kind = "shape", op = "viz.bars: series " .. i, got = n .. " values", want = #categories .. ", one a category" } end
    layer.index, layer.count, layer.values = i, #list, o.values
    legend[i].mark = "box"
    for _, p in ipairs(layer.points) do p.title = (layer.name and layer.name .. ", " or "") .. tostring(categories[p.x]) end
  end
  local y = axis(each_point(layers, "y", "low", "high"), o, "y", { 0, 1 })
  if not y.log then
    if not y.fixed_low then y.low = math.min(0, y.low) end
    if not y.fixed_high then y.high = math.max(0, y.high) end
  end
  y.round = true
  if o.values then widen(y, 0.04) if not y.log and not y.fixed_low and y.low > -1e-300 + 0 - math.abs(y.high) * 0.05 then y.low = 0 end end
  return picture_of(xy.panel { layers = layers, legend = legend, x = { categories = categories, label = o.x_label }, y = y }, o)
end
moe.document(plot.bars, "viz.bars",
  "viz.bars {series, …, categories = {\"a\", \"b\"}, values = true, " .. OPTIONS .. "}: a group of bars for each category, a bar for each series {name =, y = {…}, error = {…}}, with error bars where there is error or low and high; values writes numbers above (a format such as \"%.2f\" will do). " .. COMMON
  .. "\nExample: print(viz.bars({ { y = { 1.5, 1.2 }, error = { 0.1, 0.05 } } }, { categories = { \"aux loss\", \"loss-free\" }, y_label = \"MaxVio\" }))")

-- Edges of bins: whole numbers where the values are few integers, else by the rule of Freedman and Diaconis, 5 to 60 of them.
local function bin_edges(values, count)
  local low, high = values[1], values[#values]
  if low == high then return { low - 0.5, high + 0.5 } end
  local integers = true
  for _, v in ipairs(values) do integers = integers and v == math.floor(v) end
  local edges = {}
  if not count and integers and high - low <= 60 then
    for v = low, high + 1 do edges[#edges + 1] = v - 0.5 end
    return edges
  end
  if not count then
    local spread = values[math.max(1, math.floor(#values * 0.75))] - values[math.max(1, math.ceil(#values * 0.25))]
    local width = 2 * spread / (#values) ^ (1 / 3)
    count = width > 0 and math.max(5, math.min(60, math.ceil((high - low) / width))) or 20
  end
  for i = 0, count do edges[#edges + 1] = low + (high - low) * i / count end
  return edges
end

function plot.histogram(given, options)
  local values_given = series.is_values(given) or type(given) == "table" and type(given[1]) == "number"
  local list, o
  if values_given then
    local flat = type(given) == "table" and rawget(given, "tensor") or given
    if type(flat) == "userdata" then flat = flat:reshape({ -1 }):to_table() end
    local _, named = series.arguments({}, options or {}, "viz.histogram", { "bins", "density" })
    list, o = { { y = flat } }, named
  else
    list, o = series.arguments(given, options, "viz.histogram", { "bins", "density" })
  end
  if o.bins ~= nil and (math.type(o.bins) ~= "integer" or o.bins < 1 or o.bins > 10000) then moe.fail { op = "viz.histogram: bins", got = tostring(o.bins), want = "1 to 10000" } end
  if o.log_x then moe.fail { op = "viz.histogram: log_x", got = "true", want = "a linear axis", hint = "give logarithms of the values" } end
  local all, sorted = {}, {}
  for i, s in ipairs(list) do
    sorted[i] = {}
    for _, v in ipairs(series.numbers(s.y, "viz.histogram: series " .. i)) do
      if finite(v) then
        sorted[i][#sorted[i] + 1] = v
        all[#all + 1] = v
      end
    end
  end
  if #all == 0 then moe.fail { op = "viz.histogram", got = "no finite values", want = "at least one" } end
  table.sort(all)
  local edges = bin_edges(all, o.bins)
  local first, width = edges[1], edges[2] - edges[1]
  local layers, legend = {}, {}
  for i, s in ipairs(list) do
    local count, points = {}, {}
    for _, v in ipairs(sorted[i]) do
      local k = math.max(1, math.min(#edges - 1, math.floor((v - first) / width) + 1))
      count[k] = (count[k] or 0) + 1
    end
    for k = 1, #edges - 1 do
      local n = count[k] or 0
      points[k] = { from = edges[k], to = edges[k + 1], y = o.density and n / #sorted[i] / width or n }
    end
    layers[i] = { type = "bins", points = points, colour = s.colour or colours.of(i), opacity = #list > 1 and 0.55 or nil, name = s.name }
    legend[i] = { name = s.name or #list > 1 and "series " .. i or nil, colour = layers[i].colour, opacity = layers[i].opacity, mark = "box" }
  end
  o.y_label = o.y_label or (o.density and "density" or "count")
  local x, y = axis(each_point(layers, "from", "to"), o, "x"), axis(each_point(layers, "y"), o, "y", { 0, 1 })
  if not y.log and not y.fixed_low then y.low = 0 end
  y.round, y.is_count = true, not o.density
  return picture_of(xy.panel { layers = layers, legend = legend, x = x, y = y }, o)
end
moe.document(plot.histogram, "viz.histogram",
  "viz.histogram(values, {bins =, density = true, " .. OPTIONS .. "}): how often values fall into bins; values: a list, a tensor, a labelled array, or a list of series {{name =, y = {…}}, …} drawn over each other. Integers of a small range get a bin each. " .. COMMON
  .. "\nExample: print(viz.histogram({ 1, 2, 2, 3, 3, 3 }, { x_label = \"experts\" }))")

-- --- heat maps ---

local function rows_of(matrix)
  if type(matrix) == "table" and rawget(matrix, "tensor") then matrix = matrix.tensor end
  if type(matrix) == "userdata" then
    if matrix:dim() ~= 2 then moe.fail { kind = "shape", op = "viz.heatmap", got = matrix:dim() .. " dims", want = "a matrix, or 3 dims for a panel each" } end
    matrix = matrix:to_table()
  end
  if type(matrix) ~= "table" or type(matrix[1]) ~= "table" or #matrix[1] == 0 then
    moe.fail { kind = "shape", op = "viz.heatmap", got = type(matrix), want = "a matrix: a 2-D tensor or a list of rows" }
  end
  for i, row in ipairs(matrix) do
    if type(row) ~= "table" or #row ~= #matrix[1] then moe.fail { kind = "shape", op = "viz.heatmap: row " .. i, got = type(row) == "table" and #row .. " values" or type(row), want = #matrix[1] .. " as in the first row" } end
    for c, v in ipairs(row) do
      if type(v) ~= "number" then moe.fail { kind = "shape", op = ("viz.heatmap: row %d, column %d"):format(i, c), got = type(v), want = "a number" } end
    end
  end
  return matrix
end

-- Panels {title, rows} from a matrix, a 3-D tensor, or a list of {title =, values =}.
local function read_panels(data, titles)
  titles = titles or {}
  if type(data) == "userdata" and data:dim() == 3 then
    local list = {}
    for i = 0, #data - 1 do list[i + 1] = { title = titles[i + 1], rows = rows_of(data[i]) } end
    return list
  end
  if type(data) == "table" and type(data[1]) == "table" and rawget(data[1], "values") then
    local list = {}
    for i, p in ipairs(data) do list[i] = { title = p.title or titles[i], rows = rows_of(p.values) } end
    return list
  end
  return { { title = titles[1], rows = rows_of(data) } }
end

local function names(given, count, op)
  if given ~= nil and type(given) ~= "table" then moe.fail { op = op, got = type(given), want = "a list of names" } end
  local list, named = {}, false
  for i = 1, count do
    list[i] = given and tostring(given[i] == nil and "" or given[i]) or tostring(i - 1)
    named = named or not tonumber(list[i])
  end
  return list, named
end

local HEAT_OPTIONS = { "title", "titles", "rows", "cols", "row_label", "col_label", "scale_label", "min", "max", "centre", "log", "palette", "values", "format", "across", "width", "height" }

function plot.heatmap(data, options)
  options = moe.check_keys(options or {}, HEAT_OPTIONS, "viz.heatmap: options")
  if type(data) == "table" and data.heatmap_arguments then data, options = data:heatmap_arguments(options) end
  local list = read_panels(data, options.titles)
  local num_rows, num_cols = #list[1].rows, #list[1].rows[1]
  for i, p in ipairs(list) do
    if #p.rows ~= num_rows or #p.rows[1] ~= num_cols then
      moe.fail { kind = "shape", op = "viz.heatmap: panel " .. i, got = ("%d x %d"):format(#p.rows, #p.rows[1]), want = ("%d x %d as the first"):format(num_rows, num_cols) }
    end
  end
  local low, high = xy.range(function(f)
    for _, p in ipairs(list) do
      for _, row in ipairs(p.rows) do
        for _, v in ipairs(row) do f(v) end
      end
    end
  end, options.log)
  low, high = low or (options.log and 1 or 0), high or 1
  if not options.log and not options.centre and low > 0 and low < 0.4 * high then low = 0 end
  local scale = heat.scale({ low = options.min or low, high = options.max or high, log = options.log, centre = options.centre, palette = options.palette, label = options.scale_label }, "viz.heatmap")
  if scale.log and scale.low <= 0 then moe.fail { op = "viz.heatmap: min", got = tostring(scale.low), want = "above 0 with log = true" } end

  local row_names = names(options.rows, num_rows, "viz.heatmap: rows")
  local col_names, named_cols = names(options.cols, num_cols, "viz.heatmap: cols")
  local across = math.max(1, math.min(#list, options.across or (num_cols <= 20 and 2 or 1)))
  local panels = {}
  for i, p in ipairs(list) do
    panels[i] = heat.panel { rows = p.rows, title = p.title, scale = scale, row_names = row_names, col_names = col_names, named_cols = named_cols, row_label = options.row_label, col_label = options.col_label,
      values = options.values, format = options.format, bar = i == across }
  end
  local width = options.width or math.max(360, math.min(900, 190 + across * (num_cols * 46 + 30)))
  return layout.picture(panels, { title = options.title, width = width, height = options.height, across = across, share_x = #list > across, share_y = across > 1 })
end
moe.document(plot.heatmap, "viz.heatmap",
  'viz.heatmap(matrix, {title =, rows = {…}, cols = {…}, row_label =, col_label =, scale_label =, min =, max =, centre =, log = true, palette = "sequential" | "diverging", values =, format = "%.2f", across =, titles = {…}, width =, height =}): '
  .. "a matrix (tensor, list of rows or labelled array), three dims, or a list of {title =, values = matrix}: one panel each, on one scale. Rows and columns are named 0, 1, … where no names are given. Values stand in the cells where they fit; values = true or false says so. "
  .. "With centre = 1 blue is below 1 and orange above. Cells that are not finite are grey."
  .. "\nExample: print(viz.heatmap({ { 1, 2 }, { 3, 4 } }, { rows = { \"code\", \"text\" }, col_label = \"expert\", scale_label = \"tokens\" }))")

-- --- small multiples ---

local function shared(panels, key)
  local low, high, logarithmic = math.huge, -math.huge, nil
  for _, p in ipairs(panels) do
    local a = p[key]
    if not a or a.categories or (logarithmic ~= nil and logarithmic ~= (a.log or false)) then return false end
    logarithmic = a.log or false
    low, high = math.min(low, a.low), math.max(high, a.high)
  end
  for _, p in ipairs(panels) do p[key].low, p[key].high = low, high end
  return true
end

local function copy(t)
  local out = {}
  for key, value in pairs(t) do out[key] = value end
  return setmetatable(out, getmetatable(t))
end

function plot.panels(list, options)
  if type(list) ~= "table" or #list == 0 then moe.fail { op = "viz.panels", got = type(list) == "table" and "no plots" or type(list), want = "a list of plots, such as those of viz.line" } end
  local keys = { "title", "titles", "across", "width", "height", "share_x", "share_y", "legend" }
  local named = {}
  for key, value in pairs(list) do
    if type(key) == "string" then named[key] = value end
  end
  for key, value in pairs(moe.check_keys(options or {}, keys, "viz.panels: options")) do named[key] = value end
  options = moe.check_keys(named, keys, "viz.panels: options")
  local panels = {}
  for i, p in ipairs(list) do
    if type(p) ~= "table" or not rawget(p, "panels") then moe.fail { op = "viz.panels: plot " .. i, got = type(p), want = "a plot, such as that of viz.line" } end
    for _, panel in ipairs(p.panels) do
      panel = copy(panel)
      panel.height = nil
      for _, key in ipairs { "x", "y" } do
        if panel[key] then panel[key] = copy(panel[key]) end
      end
      panel.title = options.titles and options.titles[#panels + 1] and tostring(options.titles[#panels + 1]) or panel.title
      panels[#panels + 1] = panel
    end
  end
  local function same_label(key)
    for _, p in ipairs(panels) do
      if not p[key] or not p[key].label or p[key].label ~= panels[1][key].label then return false end
    end
    return true
  end
  local across = options.across or (#panels <= 3 and #panels or #panels == 4 and 2 or 3)
  local share_x = options.share_x == nil and same_label("x") or options.share_x
  local share_y = options.share_y == nil and same_label("y") or options.share_y
  local one_x, one_y = share_x and shared(panels, "x"), share_y and shared(panels, "y")
  return layout.picture(panels, { title = options.title, width = options.width or math.min(1000, 120 + 290 * across), height = options.height, across = across, share_x = one_x, share_y = one_y, legend = options.legend })
end
moe.document(plot.panels, "viz.panels",
  "viz.panels({p1, p2, …}, {title =, titles = {…}, across =, share_x =, share_y =, width =, height =, legend = false}): small multiples: plots side by side, one legend for all, equal areas. Axes are shared (one range, written at the outer panels) where all panels name them alike, or as the options say. Options may also stand behind the plots: viz.panels {p1, p2, title =}."
  .. "\nExample: print(viz.panels({ viz.line { { y = { 1, 2 } } }, viz.line { { y = { 2, 4 } } } }, { titles = { \"layer 1\", \"layer 2\" } }))")

return moe.document(plot, "viz", "viz (moe.plot): pictures as SVG and PNG, each with :save(path), p.svg and p:png(): viz.line, viz.scatter, viz.bars, viz.histogram, viz.heatmap, viz.panels.")

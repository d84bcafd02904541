-- Plots as SVG: curves and heat maps. moe.plot is also called viz. Each function gives an object with :save(path).
local plot = {}

local FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
local INK, SOFT, GRID = "#1f2933", "#5b6775", "#e4e8ee"
-- Hues that differ in lightness too, so that curves stay apart in grey and for colour-blind readers.
local PALETTE = { "#1f6fb4", "#e0782b", "#2a9d6f", "#b8336a", "#7a5bc7", "#8c6d1f", "#17a2b8", "#6b7280", "#c0392b", "#4c7a34" }
local MAX_POINTS = 1200

-- --- text and numbers ---

local function escape(text)
  return (tostring(text):gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end

local function text_length(text) return utf8.len(tostring(text)) or #tostring(text) end

local function num(x) return (("%.2f"):format(x):gsub("%.?0+$", "")) end

local function short(x)
  if x == 0 then return "0" end
  local a = math.abs(x)
  if a >= 1e9 then return ("%.3gG"):format(x / 1e9) end
  if a >= 1e6 then return ("%.3gM"):format(x / 1e6) end
  if a >= 1e4 then return ("%.3gk"):format(x / 1e3) end
  if a < 1e-3 then return ("%.1e"):format(x) end
  return ("%.4g"):format(x)
end

local function label(parts, x, y, text, options)
  options = options or {}
  parts[#parts + 1] = ('<text x="%s" y="%s" font-size="%s" fill="%s" text-anchor="%s"%s%s>%s</text>'):format(
    num(x), num(y), options.size or 12, options.fill or INK, options.anchor or "start",
    options.weight and (' font-weight="%s"'):format(options.weight) or "",
    options.turn and (' transform="rotate(%s %s %s)"'):format(num(options.turn), num(x), num(y)) or "", escape(text))
end

local Picture = {}
Picture.__index = Picture
Picture.__name = "plot"
Picture.__tostring = function(p) return ("plot: %d x %d SVG, save it with :save(path)"):format(p.width, p.height) end

function Picture:save(path)
  moe.fs.write(path, self.svg)
  return self
end
moe.document(Picture.save, "plot:save", "p:save(path): writes the picture as an SVG file. Returns p.")

local function picture(width, height, parts)
  local head = ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="%s">'):format(width, height, width, height, FONT)
  return setmetatable({
    width = width, height = height,
    svg = head .. ('\n<rect width="%d" height="%d" fill="#ffffff"/>\n'):format(width, height) .. table.concat(parts, "\n") .. "\n</svg>\n",
  }, Picture)
end

-- --- axes ---

-- About `count` round values that cover [low, high].
local function ticks(low, high, count)
  if high <= low then high = low + (low == 0 and 1 or math.abs(low) * 0.1) end
  local raw = (high - low) / count
  local power = 10 ^ math.floor(math.log(raw, 10))
  local step = 10 * power
  for _, m in ipairs { 1, 2, 5 } do
    if raw <= m * power * 1.0001 then step = m * power break end
  end
  local list = {}
  local first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  for i = first, last do list[#list + 1] = i * step end
  return list
end

local function log_ticks(low, high)
  local list = {}
  local decades = math.log(high / low, 10)
  for e = math.floor(math.log(low, 10)), math.ceil(math.log(high, 10)) do
    for _, m in ipairs(decades > 3 and { 1 } or decades > 1 and { 1, 3 } or { 1, 1.5, 2, 3, 4, 5, 7 }) do
      local v = m * 10 ^ e
      if v >= low * 0.999 and v <= high * 1.001 then list[#list + 1] = v end
    end
  end
  if #list < 2 then list = { low, high } end
  return list
end

-- A function from a value to a pixel, and the ticks.
local function axis(low, high, from, to, logarithmic, count)
  if logarithmic then
    local a, b = math.log(low), math.log(high)
    if b <= a then b = a + 1 end
    return function(v) return from + (math.log(v) - a) / (b - a) * (to - from) end, log_ticks(low, high)
  end
  local marks = ticks(low, high, count)
  local a, b = math.min(low, marks[1]), math.max(high, marks[#marks])
  return function(v) return from + (v - a) / (b - a) * (to - from) end, marks
end

-- --- curves ---

local function finite(v) return v == v and v ~= math.huge and v ~= -math.huge end

local function as_list(values, what)
  if type(values) == "userdata" then values = values:to_table() end
  if type(values) ~= "table" then moe.fail { op = "viz.line: " .. what, got = type(values), want = "a list of numbers or a tensor" } end
  return values
end

-- Long curves are drawn by the extremes of neighbouring points: nothing that stands out is lost.
local function thin(points)
  if #points <= MAX_POINTS then return points end
  local out, bucket = {}, math.ceil(#points / (MAX_POINTS / 2))
  for first = 1, #points, bucket do
    local low, high = first, first
    for i = first, math.min(first + bucket - 1, #points) do
      if points[i][2] < points[low][2] then low = i end
      if points[i][2] > points[high][2] then high = i end
    end
    out[#out + 1] = points[math.min(low, high)]
    if low ~= high then out[#out + 1] = points[math.max(low, high)] end
  end
  return out
end

local function read_series(series, options)
  local list = {}
  for i, s in ipairs(series) do
    local y = as_list(s.y, "y")
    local x = s.x and as_list(s.x, "x")
    if x and #x ~= #y then moe.fail { kind = "shape", op = "viz.line: series " .. i, got = ("%d x and %d y"):format(#x, #y), want = "as many x as y" } end
    local points = {}
    for k = 1, #y do
      local px, py = x and x[k] or k, y[k]
      if finite(px) and finite(py) and (not options.log_y or py > 0) and (not options.log_x or px > 0) then points[#points + 1] = { px, py } end
    end
    list[i] = { name = s.name or ("series " .. i), points = thin(points), colour = s.colour or PALETTE[(i - 1) % #PALETTE + 1], dashed = s.dashed }
  end
  return list
end

local function range_of(list, k)
  local low, high = math.huge, -math.huge
  for _, s in ipairs(list) do
    for _, p in ipairs(s.points) do low, high = math.min(low, p[k]), math.max(high, p[k]) end
  end
  return low, high
end

local function draw_legend(parts, list, x, y, right)
  for _, s in ipairs(list) do
    local width = 30 + 6.6 * text_length(s.name)
    if x + width > right then x, y = 70, y + 18 end
    parts[#parts + 1] = ('<line x1="%s" y1="%s" x2="%s" y2="%s" stroke="%s" stroke-width="3" stroke-linecap="round"%s/>'):format(
      num(x), num(y - 4), num(x + 16), num(y - 4), s.colour, s.dashed and ' stroke-dasharray="5 4"' or "")
    label(parts, x + 22, y, s.name, { fill = SOFT })
    x = x + width + 8
  end
  return y
end

function plot.line(series, options)
  options = options or series
  moe.check_keys((function() local named = {} for k, v in pairs(options) do if type(k) == "string" then named[k] = v end end return named end)(),
    { "title", "x_label", "y_label", "log_x", "log_y", "width", "height", "series", "y_min", "y_max" }, "viz.line: options")
  local list = read_series(series.series or series, options)
  local low_x, high_x = range_of(list, 1)
  local low_y, high_y = range_of(list, 2)
  if low_x > high_x then moe.fail { op = "viz.line", got = "no finite points", want = "at least one series {name =, x =, y =} with points" } end
  low_y, high_y = options.y_min or low_y, options.y_max or high_y
  local width, height = options.width or 900, options.height or 440
  local parts, left, right, top = {}, 70, width - 24, 24
  if options.title then
    label(parts, left, 30, options.title, { size = 17, weight = 600 })
    top = 44
  end
  top = (#list > 1 and draw_legend(parts, list, left, top + 10, right) or top) + 16
  local bottom = height - (options.x_label and 54 or 36)
  local to_x, marks_x = axis(low_x, high_x, left, right, options.log_x, 8)
  local to_y, marks_y = axis(low_y, high_y, bottom, top, options.log_y, 6)
  for _, v in ipairs(marks_y) do
    local y = to_y(v)
    parts[#parts + 1] = ('<line x1="%s" y1="%s" x2="%s" y2="%s" stroke="%s"/>'):format(left, num(y), right, num(y), GRID)
    label(parts, left - 8, y + 4, short(v), { anchor = "end", fill = SOFT })
  end
  for _, v in ipairs(marks_x) do
    local x = to_x(v)
    parts[#parts + 1] = ('<line x1="%s" y1="%s" x2="%s" y2="%s" stroke="%s"/>'):format(num(x), bottom, num(x), bottom + 5, SOFT)
    label(parts, x, bottom + 19, short(v), { anchor = "middle", fill = SOFT })
  end
  parts[#parts + 1] = ('<line x1="%s" y1="%s" x2="%s" y2="%s" stroke="%s"/>'):format(left, num(bottom), right, num(bottom), SOFT)
  for _, s in ipairs(list) do
    local points = {}
    for i, p in ipairs(s.points) do points[i] = num(to_x(p[1])) .. "," .. num(to_y(p[2])) end
    if #points == 1 then
      parts[#parts + 1] = ('<circle cx="%s" cy="%s" r="4" fill="%s"/>'):format(num(to_x(s.points[1][1])), num(to_y(s.points[1][2])), s.colour)
    elseif #points > 1 then
      parts[#parts + 1] = ('<polyline points="%s" fill="none" stroke="%s" stroke-width="1.8" stroke-linejoin="round"%s/>'):format(
        table.concat(points, " "), s.colour, s.dashed and ' stroke-dasharray="6 4"' or "")
    end
  end
  if options.x_label then label(parts, (left + right) / 2, height - 14, options.x_label, { anchor = "middle", size = 13 }) end
  if options.y_label then label(parts, 18, (top + bottom) / 2, options.y_label, { anchor = "middle", size = 13, turn = -90 }) end
  return picture(width, height, parts)
end
moe.document(plot.line, "viz.line",
  'viz.line { {name = "train", x = {…}, y = {…}}, …, title =, x_label =, y_label =, log_x =, log_y =, y_min =, y_max = }: curves with axes and legend. x defaults to 1, 2, …; y may be a tensor. Not finite points are left out.')

-- --- heat maps ---

-- Lightness falls evenly with t, from near white to deep blue over green: the order reads in grey as well.
-- Source: OKLab, Ottosson 2020.
local function colour(t)
  t = math.max(0, math.min(1, t))
  local L, C, h = 0.975 - 0.67 * t, 0.015 + 0.13 * math.sin(math.pi * math.min(1, 0.15 + 0.75 * t)), math.rad(110 + 165 * t)
  if t == 0 then C = 0.005 end
  local a, b = C * math.cos(h), C * math.sin(h)
  local l, m, s = (L + 0.3963377774 * a + 0.2158037573 * b) ^ 3, (L - 0.1055613458 * a - 0.0638541728 * b) ^ 3, (L - 0.0894841775 * a - 1.2914855480 * b) ^ 3
  local rgb = { 4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s }
  local hex = "#"
  for i = 1, 3 do
    local v = math.max(0, math.min(1, rgb[i]))
    v = v <= 0.0031308 and 12.92 * v or 1.055 * v ^ (1 / 2.4) - 0.055
    hex = hex .. ("%02x"):format(math.floor(v * 255 + 0.5))
  end
  return hex
end

local function rows_of(matrix)
  if type(matrix) == "userdata" then matrix = matrix:to_table() end
  if type(matrix) ~= "table" or type(matrix[1]) ~= "table" then
    moe.fail { kind = "shape", op = "viz.heatmap", got = type(matrix), want = "a matrix: a 2-D tensor or a list of rows" }
  end
  for i, row in ipairs(matrix) do
    if #row ~= #matrix[1] then moe.fail { kind = "shape", op = "viz.heatmap: row " .. i, got = #row .. " values", want = #matrix[1] .. " as in the first row" } end
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
  if type(data) == "table" and type(data[1]) == "table" and data[1].values then
    local list = {}
    for i, p in ipairs(data) do list[i] = { title = p.title or titles[i], rows = rows_of(p.values) } end
    return list
  end
  return { { title = titles[1], rows = rows_of(data) } }
end

local function labels_for(given, count)
  local list = {}
  for i = 1, count do list[i] = given and tostring(given[i] or "") or tostring(i - 1) end
  return list
end

local function longest(list)
  local n = 0
  for _, text in ipairs(list) do n = math.max(n, text_length(text)) end
  return n
end

local function draw_panel(parts, panel, g, x0, y0, with_rows)
  if panel.title then label(parts, x0, y0 - 8, panel.title, { size = 13, weight = 600 }) end
  for r, row in ipairs(panel.rows) do
    local y = y0 + (r - 1) * g.cell_h
    if with_rows then label(parts, x0 - 8, y + g.cell_h / 2 + 4, g.rows[r], { anchor = "end", fill = SOFT }) end
    for c, v in ipairs(row) do
      local t = finite(v) and (v - g.low) / (g.high - g.low) or 0
      parts[#parts + 1] = ('<rect x="%s" y="%s" width="%s" height="%s" fill="%s"><title>%s</title></rect>'):format(
        num(x0 + (c - 1) * g.cell_w), num(y), num(g.cell_w - g.gap), num(g.cell_h - g.gap), finite(v) and colour(t) or "#c9ced6", escape(g.rows[r] .. ", " .. g.cols[c] .. ": " .. short(v)))
      if g.values then
        label(parts, x0 + (c - 0.5) * g.cell_w - g.gap / 2, y + g.cell_h / 2 + 3.5, (g.format):format(v), { anchor = "middle", size = 10, fill = t > 0.5 and "#ffffff" or INK })
      end
    end
  end
  local every = math.max(1, math.ceil((longest(g.cols) * 6.4 + 6) / g.cell_w))
  local y = y0 + #panel.rows * g.cell_h + 14
  for c = 1, #g.cols, g.turn and 1 or every do
    local x = x0 + (c - 0.5) * g.cell_w - g.gap / 2
    if g.turn then
      label(parts, x + 4, y - 6, g.cols[c], { anchor = "end", size = 11, fill = SOFT, turn = -60 })
    else
      label(parts, x, y, g.cols[c], { anchor = "middle", size = 11, fill = SOFT })
    end
  end
end

local function draw_scale(parts, g, x, y, width, text)
  local steps = 48
  for i = 0, steps - 1 do
    parts[#parts + 1] = ('<rect x="%s" y="%s" width="%s" height="10" fill="%s"/>'):format(num(x + i * width / steps), num(y), num(width / steps + 0.6), colour(i / (steps - 1)))
  end
  label(parts, x, y + 24, ("%.3g"):format(g.low), { size = 11, fill = SOFT })
  label(parts, x + width, y + 24, ("%.3g"):format(g.high), { size = 11, fill = SOFT, anchor = "end" })
  if text then label(parts, x + width + 14, y + 9, text, { size = 12, fill = SOFT }) end
end

function plot.heatmap(data, options)
  options = moe.check_keys(options or {}, { "title", "titles", "rows", "cols", "row_label", "col_label", "scale_label", "min", "max", "values", "format", "across", "width" }, "viz.heatmap: options")
  local panels = read_panels(data, options.titles)
  local num_rows, num_cols = #panels[1].rows, #panels[1].rows[1]
  local low, high = math.huge, -math.huge
  for i, p in ipairs(panels) do
    if #p.rows ~= num_rows or #p.rows[1] ~= num_cols then
      moe.fail { kind = "shape", op = "viz.heatmap: panel " .. i, got = ("%d x %d"):format(#p.rows, #p.rows[1]), want = ("%d x %d as the first"):format(num_rows, num_cols) }
    end
    for _, row in ipairs(p.rows) do
      for _, v in ipairs(row) do
        if finite(v) then low, high = math.min(low, v), math.max(high, v) end
      end
    end
  end
  if low > high then low, high = 0, 1 end
  low, high = options.min or (low > 0 and low < 0.4 * high and 0 or low), options.max or high
  if high <= low then high = low + 1 end

  local width = options.width or 900
  local g = { low = low, high = high, rows = labels_for(options.rows, num_rows), cols = labels_for(options.cols, num_cols), values = options.values, format = options.format or "%.2g" }
  local left = 24 + longest(g.rows) * 6.6 + (options.row_label and 20 or 0)
  local across = math.max(1, math.min(#panels, options.across or (num_cols <= 20 and 2 or 1)))
  local between = 28
  g.cell_w = math.min(options.values and 60 or 46, (width - left - 28 - between * (across - 1)) / across / num_cols)
  g.cell_h = math.max(math.min(30, math.max(g.cell_w, 20)), num_rows > 40 and 8 or 14)
  g.gap = g.cell_w > 12 and 1.5 or 0.3
  g.turn = longest(g.cols) * 6.4 + 6 > g.cell_w and longest(g.cols) > 3
  local foot = g.turn and 20 + longest(g.cols) * 5.4 or 24
  local panel_w, panel_h = num_cols * g.cell_w, num_rows * g.cell_h + foot + 30
  local top = (options.title and 50 or 16) + (panels[1].title and 24 or 0)
  local parts = {}
  if options.title then label(parts, 24, 32, options.title, { size = 17, weight = 600 }) end
  for i, p in ipairs(panels) do
    local column, line = (i - 1) % across, (i - 1) // across
    draw_panel(parts, p, g, left + column * (panel_w + between), top + line * panel_h, column == 0)
  end
  local lines = math.ceil(#panels / across)
  local bottom = top + lines * panel_h - 30
  local drawn = across * panel_w + (across - 1) * between
  if options.col_label then label(parts, left + drawn / 2, bottom + 14, options.col_label, { anchor = "middle", size = 13 }) end
  if options.row_label then label(parts, 16, (top + bottom - foot) / 2, options.row_label, { anchor = "middle", size = 13, turn = -90 }) end
  draw_scale(parts, g, left, bottom + 30, 220, options.scale_label)
  return picture(width, math.ceil(bottom + 68), parts)
end
moe.document(plot.heatmap, "viz.heatmap",
  'viz.heatmap(matrix, {title =, rows = {…}, cols = {…}, row_label =, col_label =, scale_label =, min =, max =, values = true, format = "%.2f", across =, titles = {…}}): a matrix (tensor or list of rows), a 3-D tensor, or a list of {title =, values = matrix}: one panel each, on one scale. Rows and columns are named 0, 1, … where no names are given.')

return moe.document(plot, "viz", "viz (moe.plot): pictures as SVG, each with :save(path).")

-- A panel of coloured cells, with names, values in the cells where they fit, and a colour bar.
local axes = require "moe.plot.axes"
local colours = require "moe.plot.colours"
local layout = require "moe.plot.layout"

local heat = {}
local finite, short = axes.finite, axes.short
-- Above this a map is an image: as many rectangles would make a file of megabytes.
local MAX_RECTANGLES = 4096

local Panel = {}
Panel.__index = Panel

-- spec: rows (a list of lists), row_names, col_names, row_label, col_label, title, scale (see heat.scale), values (nil: where they fit), format, bar.
function heat.panel(spec)
  spec.num_rows, spec.num_cols = #spec.rows, #spec.rows[1]
  return setmetatable(spec, Panel)
end

-- From a value to 0 … 1: {low, high, log, centre, palette, label, format}.
function heat.scale(spec, op)
  spec.colours = colours.scale(spec.palette or (spec.centre and "diverging" or "sequential"), op)
  if spec.centre then
    local reach = math.max(math.abs(spec.high - spec.centre), math.abs(spec.centre - spec.low))
    if reach == 0 then reach = 1 end
    spec.at = function(v) return 0.5 + (v - spec.centre) / (2 * reach) end
  end
  if spec.high <= spec.low then spec.high = spec.low + (spec.log and spec.low or 1) end
  if spec.at then return spec end
  if spec.log then
    local a, b = math.log(spec.low), math.log(spec.high)
    spec.at = function(v) return v > 0 and (math.log(v) - a) / (b - a) or 0 end
  else
    spec.at = function(v) return (v - spec.low) / (spec.high - spec.low) end
  end
  return spec
end

function Panel:text_of(v)
  if not finite(v) then return "" end
  return self.format and self.format:format(v) or short(tonumber(("%.3g"):format(v)))
end

-- The scale's name in lines that fit beside the bar.
local function label_lines(panel, height)
  if not panel.scale.label then return {} end
  local lines = { "" }
  for word in tostring(panel.scale.label):gmatch("%S+") do
    local longer = lines[#lines] == "" and word or lines[#lines] .. " " .. word
    if lines[#lines] ~= "" and #lines < 3 and layout.text_width(longer, 12) > math.max(60, height + 8) then lines[#lines + 1] = word
    else lines[#lines] = longer end
  end
  return lines
end

local function bar_width(panel, height)
  axes.place_ticks(panel.scale.axis, height, function() return 22 end)
  return 14 + 12 + 6 + layout.widest(panel.scale.axis.texts, 11) + 6 + 15 * #label_lines(panel, height)
end

function Panel:measure(width, height, show)
  local left = show.y and math.min(160, layout.widest(self.row_names, 12)) + 8 + (self.row_label and 22 or 0) or 2
  local cell = width / self.num_cols
  local wide = layout.widest(self.col_names, 11)
  local step = math.ceil((wide + 8) / cell)
  self.turned = self.named_cols and step > 1
  self.every = self.turned and math.max(1, math.ceil(12 / cell)) or step
  self.every_row = math.max(1, math.ceil(12 / (height / self.num_rows)))
  local deep = self.turned and math.min(110, wide) * 0.71 + 12 or 18
  local scale = self.scale
  scale.axis = { low = scale.low, high = scale.high, log = scale.log }
  return left, self.bar and bar_width(self, height) or 4, self.title and 24 or 4, show.x and deep + (self.col_label and 22 or 0) or 4
end

function Panel:height_for(width)
  local cell = width / self.num_cols
  local high = self.num_rows > 40 and 9 or math.max(16, math.min(30, cell))
  return math.max(60, self.num_rows * math.max(high, math.min(3, 400 / self.num_rows)))
end

local function draw_cells(panel, sheet, box)
  local w, h = box.width / panel.num_cols, box.height / panel.num_rows
  local scale = panel.scale
  if panel.num_rows * panel.num_cols > MAX_RECTANGLES then
    local bytes, missing = {}, string.char(0xc9, 0xce, 0xd6)
    for _, row in ipairs(panel.rows) do
      for _, v in ipairs(row) do bytes[#bytes + 1] = finite(v) and scale.colours.bytes(scale.at(v)) or missing end
    end
    sheet:add("cells", { x = box.x, y = box.y, width = box.width, height = box.height, rows = panel.num_rows, cols = panel.num_cols, rgb = table.concat(bytes) })
    return
  end
  local gap = math.min(w, h) > 12 and 1.5 or math.min(w, h) > 5 and 0.5 or 0
  local size = math.min(11, h * 0.55)
  local with_values = panel.values
  if with_values == nil then
    with_values = h >= 15
    for _, row in ipairs(panel.rows) do
      for _, v in ipairs(row) do with_values = with_values and layout.text_width(panel:text_of(v), size) <= w - 4 end
    end
  end
  for r, row in ipairs(panel.rows) do
    local y = box.y + (r - 1) * h
    for c, v in ipairs(row) do
      local x, t = box.x + (c - 1) * w, finite(v) and scale.at(v) or 0
      sheet:rect(x, y, w - gap, h - gap, { fill = finite(v) and scale.colours.hex(t) or colours.missing, title = ("%s, %s: %s"):format(panel.row_names[r], panel.col_names[c], short(v)) })
      if with_values then
        sheet:text(x + (w - gap) / 2, y + (h - gap) / 2 + size * 0.36, panel:text_of(v), { size = size, anchor = "middle", fill = (not finite(v) or scale.colours.is_light(t)) and colours.ink or colours.paper })
      end
    end
  end
end

local function draw_bar(panel, sheet, box)
  local x, scale = box.x + box.width + 14, panel.scale
  local height = box.height
  axes.place_ticks(scale.axis, height, function() return 22 end)
  local axis = scale.axis
  axis.from, axis.to = scale.low, scale.high
  local to_y = axes.to_pixel(axis, box.y + height, box.y)
  local bytes, steps = {}, 128
  for i = 1, steps do 
    local t = 1 - (i - 0.5) / steps
    bytes[i] = scale.colours.bytes(scale.at(scale.log and scale.low * (scale.high / scale.low) ^ t or scale.low + t * (scale.high - scale.low)))
  end
  sheet:add("cells", { x = x, y = box.y, width = 12, height = height, rows = steps, cols = 1, rgb = table.concat(bytes) })
  for i, v in ipairs(axis.ticks) do
    if v >= scale.low - 1e-12 * math.abs(scale.low) and v <= scale.high * (1 + 1e-12) then
      sheet:line(x + 12, to_y(v), x + 15, to_y(v), colours.frame)
      sheet:text(x + 18, to_y(v) + 4, axis.texts[i], { size = 11, fill = colours.soft })
    end
  end
  for i, line in ipairs(label_lines(panel, box.height)) do
    sheet:text(x + 18 + layout.widest(axis.texts, 11) + 2 + 15 * i, box.y + box.height / 2, layout.fit(line, math.max(70, box.height + 20), 12), { size = 12, anchor = "middle", turn = -90, fill = colours.soft })
  end
end

function Panel:draw(sheet, box, show)
  if self.title then sheet:text(box.x, box.y - 9, layout.fit(self.title, box.width, 13, true), { size = 13, bold = true }) end
  draw_cells(self, sheet, box)
  local w, h, bottom = box.width / self.num_cols, box.height / self.num_rows, box.y + box.height
  if show.y then
    for r = 1, self.num_rows, self.every_row do
      sheet:text(box.x - 7, box.y + (r - 0.5) * h + 4, layout.fit(self.row_names[r], 160, 12), { anchor = "end", fill = colours.soft })
    end
    if self.row_label then
      sheet:text(box.x - math.min(160, layout.widest(self.row_names, 12)) - 16, box.y + box.height / 2, layout.fit(self.row_label, math.max(80, box.height + 30), 13), { size = 13, anchor = "middle", turn = -90 })
    end
  end
  if show.x then
    for c = 1, self.num_cols, self.every do
      local x = box.x + (c - 0.5) * w
      if self.turned then sheet:text(x + 3, bottom + 11, layout.fit(self.col_names[c], 110, 11), { size = 11, anchor = "end", turn = -45, fill = colours.soft })
      else sheet:text(x, bottom + 14, self.col_names[c], { size = 11, anchor = "middle", fill = colours.soft }) end
    end
    if self.col_label then
      local deep = self.turned and math.min(110, layout.widest(self.col_names, 11)) * 0.71 + 12 or 18
      sheet:text(box.x + box.width / 2, bottom + deep + 15, layout.fit(self.col_label, box.width + 40, 13), { size = 13, anchor = "middle" })
    end
  end
  if self.bar then draw_bar(self, sheet, box) end
end

return heat

-- A panel with an x and a y axis: layers of lines with bands, points, bars, bins; marks at events.
local axes = require "moe.plot.axes"
local colours = require "moe.plot.colours"
local layout = require "moe.plot.layout"

local xy = {}
local finite, short = axes.finite, axes.short
local MAX_POINTS = 1200

local Panel = {}
Panel.__index = Panel

-- spec: layers, x and y (axes), title, events {x, text, colour}, levels {y, text, colour}, legend.
function xy.panel(spec) return setmetatable(spec, Panel) end

-- Long curves are drawn by the extremes of neighbouring points: nothing that stands out is lost.
local function thin(points)
  if #points <= MAX_POINTS then return points end
  local out, bucket = {}, math.ceil(#points / (MAX_POINTS / 2))
  for first = 1, #points, bucket do
    local low, high = first, first
    for i = first, math.min(first + bucket - 1, #points) do
      if points[i].y < points[low].y then low = i end
      if points[i].y > points[high].y then high = i end
    end
    out[#out + 1] = points[math.min(low, high)]
    if low ~= high then out[#out + 1] = points[math.max(low, high)] end
  end
  return out
end

-- --- layers: draw(layer, sheet, to_x, to_y, panel) ---

local draw = {}

local function polyline(points, to_x, to_y, key)
  local flat = {}
  for _, p in ipairs(points) do
    flat[#flat + 1] = to_x(p.x)
    flat[#flat + 1] = to_y(p[key or "y"])
  end
  return flat
end

local function whisker(sheet, x, y1, y2, colour, half)
  sheet:line(x, y1, x, y2, colour, 1.3)
  sheet:line(x - half, y1, x + half, y1, colour, 1.3)
  sheet:line(x - half, y2, x + half, y2, colour, 1.3)
end

function draw.line(layer, sheet, to_x, to_y, panel)
  local points = thin(layer.points)
  if layer.has_interval and not layer.whiskers then
    local outline = polyline(points, to_x, to_y, "low")
    for i = #points, 1, -1 do
      outline[#outline + 1] = to_x(points[i].x)
      outline[#outline + 1] = to_y(points[i].high)
    end
    sheet:add("path", { points = outline, fill = layer.colour, opacity = 0.18 })
  elseif layer.has_interval then
    for _, p in ipairs(points) do whisker(sheet, to_x(p.x), to_y(p.low), to_y(p.high), layer.colour, 3.5) end
  end
  if #points > 1 then
    sheet:add("path", { points = polyline(points, to_x, to_y), stroke = layer.colour, stroke_width = layer.width or 2, dash = layer.dash })
  end
  if #points == 1 or layer.markers or (layer.markers == nil and #points <= 12) then
    for _, p in ipairs(points) do
      sheet:add("circle", { x = to_x(p.x), y = to_y(p.y), radius = 3.5, fill = layer.colour, stroke = colours.paper, stroke_width = 1, title = p.title or (layer.name and layer.name .. ": " or "") .. short(p.x) .. ", " .. short(p.y) })
    end
  end
end

-- Right of and above the dot, or on the other side of it where the text would leave the area.
local function place_label(sheet, x, y, text)
  local left, top, width, height = table.unpack(sheet.clip)
  if x < left or x > left + width or y < top or y > top + height then return end
  text = layout.fit(text, width, 11)
  local w = layout.text_width(text, 11)
  local start = x + 7 + w <= left + width and x + 7 or x - 7 - w
  sheet:text(math.max(start, left), y - 5 - 10 >= top and y - 5 or y + 14, text, { size = 11, fill = colours.soft })
end

function draw.points(layer, sheet, to_x, to_y)
  local many = #layer.points > 400
  for _, p in ipairs(layer.points) do
    local x, y = to_x(p.x), to_y(p.y)
    if p.low then whisker(sheet, x, to_y(p.low), to_y(p.high), layer.colour, 3.5) end
    sheet:add("circle", { x = x, y = y, radius = layer.size or (many and 2 or 4), fill = layer.colour, opacity = many and 0.5 or 0.8,
      title = #layer.points <= 2000 and ((p.label or layer.name or "") .. " " .. short(p.x) .. ", " .. short(p.y)) or nil })
    if p.label then place_label(sheet, x, y, p.label) end
  end
end

function draw.bars(layer, sheet, to_x, to_y, panel)
  local width = 0.78 / layer.count
  for _, p in ipairs(layer.points) do
    local left, right = to_x(p.x - 0.39 + (layer.index - 1) * width), to_x(p.x - 0.39 + layer.index * width)
    if layer.count > 1 and right - left > 4 then right = right - 1 end
    local base, top = to_y(panel.y.log and panel.y.from or math.max(panel.y.from, math.min(panel.y.to, 0))), to_y(p.y)
    sheet:rect(left, math.min(base, top), right - left, math.abs(base - top), { fill = layer.colour, title = p.title .. ": " .. short(p.y) })
    if p.low then whisker(sheet, (left + right) / 2, to_y(p.low), to_y(p.high), colours.ink, math.min(4, (right - left) / 3)) end
    if layer.values then
      local text = type(layer.values) == "string" and layer.values:format(p.y) or short(p.y)
      local above = to_y(p.high or p.y)
      if layout.text_width(text, 10) <= (right - left) + 8 then
        sheet:text((left + right) / 2, p.y < 0 and to_y(p.low or p.y) + 12 or above - 4, text, { size = 10, anchor = "middle", fill = colours.soft })
      end
    end
  end
end

function draw.bins(layer, sheet, to_x, to_y, panel)
  for _, p in ipairs(layer.points) do
    local left, right = to_x(p.from), to_x(p.to)
    local base, top = to_y(panel.y.from), to_y(p.y)
    if base > top then
      sheet:rect(left, top, math.max(0.5, right - left - (right - left > 5 and 1 or 0)), base - top,
        { fill = layer.colour, opacity = layer.opacity, title = ("%s to %s: %s"):format(short(p.from), short(p.to), short(p.y)) })
    end
  end
end

-- --- the panel ---

-- Rows for the events' texts above the area, from the right: each in the first row where it does not touch the next one, so that the
-- line of an event, which goes up to its row, meets no text.
local function place_events(panel, width)
  local list, starts = {}, {}
  if not panel.events or #panel.events == 0 then return list, 0 end
  local to_x = axes.to_pixel(panel.x, 0, width)
  local sorted = { table.unpack(panel.events) }
  table.sort(sorted, function(a, b) return a.x > b.x end)
  for _, e in ipairs(sorted) do
    if finite(e.x) and e.x >= panel.x.from and e.x <= panel.x.to and (not panel.x.log or e.x > 0) then
      local x, text = to_x(e.x), e.text and layout.fit(e.text, width, 11)
      local place = { x = x, colour = e.colour or colours.soft, text = text }
      if text then
        local w = layout.text_width(text, 11)
        place.left = math.max(0, math.min(x - 3, width - w))
        local row = 1
        while starts[row] and starts[row] < place.left + w + 10 do row = row + 1 end
        place.row, starts[row] = row, place.left
      end
      list[#list + 1] = place
    end
  end
  return list, #starts
end

function Panel:measure(width, height, show)
  axes.place_ticks(self.y, height, function() return 20 end)
  axes.place_ticks(self.x, width, function(texts) return layout.widest(texts, 12) + 14 end)
  self.turned = self.x.categories and layout.widest(self.x.texts, 12) + 8 > width / math.max(1, #self.x.texts) or false
  local deep = self.turned and math.min(110, layout.widest(self.x.texts, 12)) * 0.71 + 14 or 20
  local left = show.y and layout.widest(self.y.texts, 12) + 9 + (self.y.label and 22 or 0) or 2
  if self.turned then left = math.max(left, math.min(110, layout.text_width(self.x.texts[1], 12)) * 0.71 - width / #self.x.texts / 2 + 10) end
  local last = self.x.ticks[#self.x.ticks]
  local right = 6
  if show.x and last and not self.turned then
    right = math.max(right, layout.text_width(self.x.texts[#self.x.texts], 12) / 2 - (width - axes.to_pixel(self.x, 0, width)(last)))
  end
  local _, rows = place_events(self, width)
  return left, right, (self.title and 24 or 6) + rows * 15, (show.x and deep + (self.x.label and 22 or 0) or 4)
end

function Panel:height_for(width) return self.height or math.max(150, math.min(300, width * 0.62)) end

function Panel:draw(sheet, box, show)
  local right, bottom = box.x + box.width, box.y + box.height
  local to_x, to_y = axes.to_pixel(self.x, box.x, right), axes.to_pixel(self.y, bottom, box.y)
  local events, rows = place_events(self, box.width)
  if self.title then sheet:text(box.x, box.y - 9 - rows * 15, layout.fit(self.title, box.width, 13, true), { size = 13, bold = true }) end
  for _, v in ipairs(self.y.minor) do sheet:line(box.x, to_y(v), right, to_y(v), "#f3f5f8") end
  for _, v in ipairs(self.x.minor) do sheet:line(to_x(v), bottom, to_x(v), box.y, "#f3f5f8") end
  for i, v in ipairs(self.y.ticks) do
    sheet:line(box.x, to_y(v), right, to_y(v), colours.grid)
    if show.y then sheet:text(box.x - 8, to_y(v) + 4.2, self.y.texts[i], { anchor = "end", fill = colours.soft }) end
  end
  for i, v in ipairs(self.x.ticks) do
    local x = to_x(v)
    if not self.x.categories then
      if self.x_grid then sheet:line(x, bottom, x, box.y, colours.grid) end
      sheet:line(x, bottom, x, bottom + 4, colours.frame)
    end
    if show.x then
      if self.turned then sheet:text(x + 4, bottom + 13, layout.fit(self.x.texts[i], 110, 12), { anchor = "end", turn = -45, fill = colours.soft })
      else sheet:text(x, bottom + 18, self.x.texts[i], { anchor = "middle", fill = colours.soft }) end
    end
  end
  for _, e in ipairs(events) do
    local x = box.x + e.x
    sheet:line(x, e.row and box.y - 4 - (e.row - 1) * 15 or box.y, x, bottom, e.colour, 1, { 4, 3 })
    if e.text then sheet:text(box.x + e.left, box.y - 7 - (e.row - 1) * 15, e.text, { size = 11, fill = e.colour }) end
  end
  local base = not self.y.log and self.y.from < 0 and self.y.to > 0 and to_y(0) or bottom
  if base ~= bottom then sheet:line(box.x, base, right, base, colours.frame) end
  sheet:line(box.x, bottom, right, bottom, colours.frame)
  -- A little larger than the area, so that lines and dots on its edge are whole.
  sheet.clip = { box.x - 5, box.y - 5, box.width + 10, box.height + 10 }
  if self.clip_y then sheet.clip = { box.x - 5, box.y, box.width + 10, box.height } end
  for _, layer in ipairs(self.layers) do draw[layer.type](layer, sheet, to_x, to_y, self) end
  sheet.clip = nil
  for _, l in ipairs(self.levels or {}) do
    if finite(l.y) and l.y >= self.y.from and l.y <= self.y.to then
      local y = to_y(l.y)
      sheet:line(box.x, y, right, y, l.colour or colours.soft, 1.2, { 5, 4 })
      if l.text then sheet:text(right - 4, y - 5, l.text, { size = 11, anchor = "end", fill = l.colour or colours.soft }) end
    end
  end
  if show.x and self.x.label then
    local deep = self.turned and math.min(110, layout.widest(self.x.texts, 12)) * 0.71 + 14 or 20
    sheet:text(box.x + box.width / 2, bottom + deep + 16, layout.fit(self.x.label, box.width + 40, 13), { size = 13, anchor = "middle" })
  end
  if show.y and self.y.label then
    sheet:text(box.x - layout.widest(self.y.texts, 12) - 18, box.y + box.height / 2, layout.fit(self.y.label, box.height + 40, 13), { size = 13, anchor = "middle", turn = -90 })
  end
end

-- Range of all values that `each(f)` gives to f; nil where there is none.
function xy.range(each, logarithmic)
  local low, high = math.huge, -math.huge
  each(function(v)
    if v and finite(v) and (not logarithmic or v > 0) then low, high = math.min(low, v), math.max(high, v) end
  end)
  if low > high then return nil end
  return low, high
end

return xy

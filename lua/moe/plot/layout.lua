-- Panels on a sheet: title, legend, a grid of panels whose inner areas are equal and aligned.
-- A panel has measure(width, height, show) → {left, right, top, bottom} margins for an inner area of that size, height_for(width), draw(sheet, box, show),
-- and `legend`, a list of {name, colour, mark}; show = {x = is the x axis written, y = …}.
local colours = require "moe.plot.colours"
local Sheet = require "moe.plot.sheet"

local layout = {}
local PAD, GAP_X, GAP_Y = 16, 20, 16

function layout.text_width(text, size, bold) return moe.draw.text_width(text, size or 12, bold) end

function layout.widest(texts, size)
  local width = 0
  for _, text in ipairs(texts) do width = math.max(width, layout.text_width(text, size)) end
  return width
end

-- A text cut to a width, with "…".
function layout.fit(text, width, size, bold)
  text = tostring(text)
  if layout.text_width(text, size, bold) <= width then return text end
  local cut = {}
  for _, code in utf8.codes(text, true) do
    cut[#cut + 1] = utf8.char(code)
    if layout.text_width(table.concat(cut) .. "…", size, bold) > width then
      cut[#cut] = nil
      break
    end
  end
  return table.concat(cut) .. "…"
end

local marks = {}
function marks.line(sheet, x, y, e) sheet:line(x, y, x + 18, y, e.colour, 2.5, e.dash) end
function marks.band(sheet, x, y, e)
  sheet:rect(x, y - 5, 18, 10, { fill = e.colour, opacity = 0.18 })
  marks.line(sheet, x, y, e)
end
function marks.dot(sheet, x, y, e) sheet:add("circle", { x = x + 9, y = y, radius = 4.5, fill = e.colour }) end
function marks.box(sheet, x, y, e) sheet:rect(x + 3, y - 6, 12, 12, { fill = e.colour, opacity = e.opacity }) end

-- Entries of all panels, each name once; none where there is but one unnamed series.
local function entries_of(panels)
  local list, seen = {}, {}
  for _, panel in ipairs(panels) do
    for _, e in ipairs(panel.legend or {}) do
      if e.name and not seen[e.name] then
        seen[e.name] = true
        list[#list + 1] = e
      end
    end
  end
  return list
end

-- Draws the legend in lines that begin at x; returns the y below.
local function draw_legend(sheet, entries, x, y, right)
  local left = x
  for _, e in ipairs(entries) do
    local name = layout.fit(e.name, right - left - 24, 12)
    local width = 24 + layout.text_width(name, 12)
    if x > left and x + width > right then x, y = left, y + 19 end
    marks[e.mark](sheet, x, y + 7, e)
    sheet:text(x + 24, y + 11.5, name, { fill = colours.soft })
    x = x + width + 18
  end
  return y + 24
end

-- Margins of every column and row for inner areas of a size.
local function measure(panels, across, width, height, show)
  local m = { left = {}, right = {}, top = {}, bottom = {} }
  for i, panel in ipairs(panels) do
    local c, r = (i - 1) % across + 1, (i - 1) // across + 1
    local left, right, top, bottom = panel:measure(width, height, show[i])
    m.left[c], m.right[c] = math.max(m.left[c] or 0, left), math.max(m.right[c] or 0, right)
    m.top[r], m.bottom[r] = math.max(m.top[r] or 0, top), math.max(m.bottom[r] or 0, bottom)
  end
  return m
end

local function sum(...)
  local total = 0
  for _, list in ipairs { ... } do
    for _, v in ipairs(list) do total = total + v end
  end
  return total
end

-- options: title, width, height, across, share_x, share_y (axes written at the outer panels only), legend = false.
function layout.picture(panels, options)
  local across = math.max(1, math.min(#panels, options.across or 1))
  local rows = math.ceil(#panels / across)
  local width = options.width or 720
  if type(width) ~= "number" or width < 120 or width > 10000 then moe.fail { op = "plot: width", got = tostring(width), want = "120 to 10000" } end
  if options.height and (type(options.height) ~= "number" or options.height < 90 or options.height > 10000) then moe.fail { op = "plot: height", got = tostring(options.height), want = "90 to 10000" } end
  local sheet = Sheet.new()
  local y = PAD
  if options.title then
    sheet:text(PAD, y + 13, layout.fit(options.title, width - 2 * PAD, 16, true), { size = 16, bold = true })
    y = y + 30
  end
  local entries = options.legend ~= false and entries_of(panels) or {}
  if #entries > 1 or (#entries == 1 and options.legend) then y = draw_legend(sheet, entries, PAD, y, width - PAD) end

  local show = {}
  for i = 1, #panels do show[i] = { x = not options.share_x or i + across > #panels, y = not options.share_y or (i - 1) % across == 0 } end
  local inner_w, inner_h = width / across - 70, 160
  local m
  for _ = 1, 3 do
    m = measure(panels, across, inner_w, inner_h, show)
    inner_w = math.max(30, (width - 2 * PAD - sum(m.left, m.right) - GAP_X * (across - 1)) / across)
    if options.height then inner_h = math.max(30, (options.height - y - PAD - sum(m.top, m.bottom) - GAP_Y * (rows - 1)) / rows)
    else
      inner_h = 0
      for _, panel in ipairs(panels) do inner_h = math.max(inner_h, panel:height_for(inner_w)) end
    end
  end
  m = measure(panels, across, inner_w, inner_h, show)
  local top = y
  for r = 1, rows do
    local left = PAD
    for c = 1, across do
      local i = (r - 1) * across + c
      if panels[i] then panels[i]:draw(sheet, { x = left + m.left[c], y = top + m.top[r], width = inner_w, height = inner_h }, show[i]) end
      left = left + m.left[c] + inner_w + m.right[c] + GAP_X
    end
    top = top + m.top[r] + inner_h + m.bottom[r] + GAP_Y
  end
  return sheet:picture(width, options.height or top - GAP_Y + PAD, panels)
end

return layout

-- Axes: ranges, round ticks, their texts, and the way from a value to a pixel.
local axes = {}

function axes.finite(v) return v == v and v ~= math.huge and v ~= -math.huge end

local SUPERSCRIPT = { ["-"] = "⁻", ["0"] = "⁰", ["1"] = "¹", ["2"] = "²", ["3"] = "³", ["4"] = "⁴", ["5"] = "⁵", ["6"] = "⁶", ["7"] = "⁷", ["8"] = "⁸", ["9"] = "⁹" }
local function power_of_ten(e) return "10" .. (tostring(e):gsub(".", SUPERSCRIPT)) end
local function signed(text) return (text:gsub("^%-", "−")) end

-- A single value, four digits.
function axes.short(v)
  if not axes.finite(v) then return tostring(v) end
  local a = math.abs(v)
  if a == 0 then return "0" end
  for _, unit in ipairs { { 1e9, "G" }, { 1e6, "M" }, { 1e4, "k" } } do
    if a >= unit[1] then
      local scale = unit[2] == "k" and 1e3 or unit[1]
      return a < 1e15 and signed(("%.4g%s"):format(v / scale, unit[2])) or signed(("%.3g"):format(v))
    end
  end
  if a < 1e-3 then
    local e = math.floor(math.log(a, 10) + 1e-9)
    local m = v / 10.0 ^ e
    local digits = ("%.2g"):format(m)
    return digits == "1" and power_of_ten(e) or signed(digits) .. "×" .. power_of_ten(e)
  end
  return signed(math.type(v) == "integer" and tostring(v) or ("%.4g"):format(v))
end

-- Texts of ticks that are `step` apart: all with as many digits as the step needs.
local function tick_texts(values, step)
  local top = 0
  for _, v in ipairs(values) do top = math.max(top, math.abs(v)) end
  local list = {}
  if top > 0 and top < 1e-3 or top >= 1e15 then
    for i, v in ipairs(values) do list[i] = axes.short(v) end
    return list
  end
  local scale, suffix = 1, ""
  for _, unit in ipairs { { 1e9, "G" }, { 1e6, "M" }, { 1e4, "k" } } do
    if top >= unit[1] then scale, suffix = unit[2] == "k" and 1e3 or unit[1], unit[2] break end
  end
  local digits = 0
  while digits < 9 and math.abs(step / scale * 10 ^ digits - math.floor(step / scale * 10 ^ digits + 0.5)) > 1e-6 * step / scale * 10 ^ digits do digits = digits + 1 end
  if digits > 3 and suffix ~= "" then
    scale, suffix, digits = 1, "", 0
    while digits < 9 and math.abs(step * 10 ^ digits - math.floor(step * 10 ^ digits + 0.5)) > 1e-6 * step * 10 ^ digits do digits = digits + 1 end
  end
  for i, v in ipairs(values) do
    list[i] = math.abs(v) < step * 1e-6 and "0" or signed(("%." .. digits .. "f"):format(v / scale)) .. suffix
  end
  return list
end

-- The round step that cuts [low, high] into at most `count` parts.
local function round_step(low, high, count)
  local raw = (high - low) / math.max(1, count)
  local power = 10.0 ^ math.floor(math.log(raw, 10))
  for _, m in ipairs { 1, 2, 2.5, 5 } do
    if raw <= m * power * 1.0001 then return m * power end
  end
  return 10 * power
end

local function linear_ticks(axis, count)
  local low, high = axis.low, axis.high
  local step = round_step(low, high, count)
  if axis.is_count then step = math.max(1, math.ceil(step)) end
  if axis.round then
    if not axis.fixed_low then low = math.floor(low / step + 1e-9) * step end
    if not axis.fixed_high then high = math.ceil(high / step - 1e-9) * step end
  end
  local values = {}
  for i = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) do values[#values + 1] = i * step end
  return low, high, values, tick_texts(values, step), {}
end

local function log_ticks(axis, count)
  local low, high = axis.low, axis.high
  local decades = math.log(high / low, 10)
  if axis.round and decades > 0.6 then
    local function outwards(v, up)
      local e = math.floor(math.log(v, 10) + 1e-9)
      local best = up and 10.0 ^ (e + 1) or 10.0 ^ e
      for _, m in ipairs { 1, 2, 5 } do
        local t = m * 10.0 ^ e
        if up and t >= v * 0.9999 then return t end
        if not up and t <= v * 1.0001 then best = t end
      end
      return best
    end
    if not axis.fixed_low then low = outwards(low, false) end
    if not axis.fixed_high then high = outwards(high, true) end
  end
  decades = math.log(high / low, 10)
  local every = math.max(1, math.ceil(decades / math.max(2, count)))
  local marks = decades > 2.2 and { 1 } or decades > 0.9 and { 1, 2, 5 } or { 1, 1.5, 2, 3, 4, 5, 7 }
  local values, minor, labels = {}, {}, {}
  for e = math.floor(math.log(low, 10) + 1e-9), math.ceil(math.log(high, 10) - 1e-9) do
    for m = 1, 9 do
      local v = m * 10.0 ^ e
      if v >= low * 0.9999 and v <= high * 1.0001 then minor[#minor + 1] = v end
    end
    for _, m in ipairs(marks) do
      local v = m * 10.0 ^ e
      if v >= low * 0.9999 and v <= high * 1.0001 and e % every == 0 then values[#values + 1] = v end
    end
  end
  if #values < 2 then
    local _, _, v = linear_ticks({ low = low, high = high }, 4)
    values = {}
    for _, x in ipairs(v) do if x > 0 then values[#values + 1] = x end end
  end
  if decades > 8 then minor = {} end
  for i, v in ipairs(values) do
    local e = math.floor(math.log(v, 10) + 1e-9)
    local m = v / 10.0 ^ e
    labels[i] = v >= 0.999e-3 and v < 1e5 and ("%.6g"):format(v) or math.abs(m - 1) < 1e-6 and power_of_ten(e) or ("%.3g×%s"):format(m, power_of_ten(e))
  end
  return low, high, values, labels, minor
end

-- Sets ticks, texts and final range of an axis {low, high, log, round, categories, fixed_low, fixed_high, is_count} for a length in pixels;
-- `room(texts)` is the length that the widest text needs.
function axes.place_ticks(axis, length, room)
  if axis.categories then
    axis.from, axis.to, axis.ticks, axis.texts, axis.minor = 0.5, #axis.categories + 0.5, {}, {}, {}
    for i, text in ipairs(axis.categories) do axis.ticks[i], axis.texts[i] = i, tostring(text) end
    return
  end
  if not (axis.high > axis.low) then
    local pad = axis.low == 0 and 1 or math.abs(axis.low) * 0.1
    if axis.log then axis.low, axis.high = axis.low / 1.5, axis.low * 1.5
    else axis.low, axis.high = axis.fixed_low and axis.low or axis.low - pad, axis.high + pad end
  end
  local make = axis.log and log_ticks or linear_ticks
  local function place(count, share)
    axis.from, axis.to, axis.ticks, axis.texts, axis.minor = make(axis, count)
    return room(axis.texts) * #axis.texts <= length * (share or 1.02)
  end
  local most = math.max(2, math.floor(length / 44))
  local count = most
  while not place(count) and count > 1 do count = count - 1 end
  if #axis.ticks > 1 then return end
  -- One number is no scale: of finer ones the first that has two, which may stand closer.
  for finer = count + 1, most + 4 do
    if place(finer, 1.12) and #axis.ticks > 1 then return end
  end
  place(count)
end

-- Where a value lies between pixels a and b.
function axes.to_pixel(axis, a, b)
  local from, to = axis.from, axis.to
  if axis.log then
    from, to = math.log(from), math.log(to)
    return function(v) return a + (math.log(v) - from) / (to - from) * (b - a) end
  end
  return function(v) return a + (v - from) / (to - from) * (b - a) end
end

return axes

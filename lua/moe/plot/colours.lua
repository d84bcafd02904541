-- Colours of plots: a list of hues for series, scales for heat maps. Readable for colour-blind readers and in grey.
local colours = {
  ink = "#1f2933", soft = "#52606d", grid = "#e4e8ee", frame = "#9aa5b1", missing = "#c9ced6", paper = "#ffffff",
  -- Source: Okabe and Ito 2008, the yellow darkened so that a line of it is seen on white.
  series = { "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b08d00", "#5b4ea3", "#6b7280", "#8c2d04", "#1b5e20" },
}

-- Linear light to a byte of sRGB.
local function byte(v)
  v = math.max(0, math.min(1, v))
  v = v <= 0.0031308 and 12.92 * v or 1.055 * v ^ (1 / 2.4) - 0.055
  return math.floor(v * 255 + 0.5)
end

-- Source: OKLab, Ottosson 2020.
local function oklch(L, C, h)
  local a, b = C * math.cos(math.rad(h)), C * math.sin(math.rad(h))
  local l, m, s = (L + 0.3963377774 * a + 0.2158037573 * b) ^ 3, (L - 0.1055613458 * a - 0.0638541728 * b) ^ 3, (L - 0.0894841775 * a - 1.2914855480 * b) ^ 3
  return byte(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s), byte(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    byte(-0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s)
end

-- Lightness falls evenly with t, from near white to deep blue over green: the order reads in grey as well.
local function sequential(t)
  return oklch(0.975 - 0.67 * t, 0.015 + 0.088 * math.sin(math.pi * math.min(1, 0.15 + 0.75 * t)), 110 + 165 * t)
end

-- Blue below the middle, white at it, orange above.
local function diverging(t)
  local d = math.abs(2 * t - 1)
  return oklch(0.975 - 0.45 * d, 0.005 + 0.135 * d ^ 0.8, t < 0.5 and 250 or 50)
end

local STEPS = 256
local function ramp(f)
  local hex, bytes, light = {}, {}, {}
  for i = 0, STEPS - 1 do
    local r, g, b = f(i / (STEPS - 1))
    hex[i], bytes[i], light[i] = ("#%02x%02x%02x"):format(r, g, b), string.char(r, g, b), 0.299 * r + 0.587 * g + 0.114 * b > 140
  end
  local function index(t) return math.floor(math.max(0, math.min(1, t)) * (STEPS - 1) + 0.5) end
  -- hex(t), three bytes of it, and whether dark text reads well on it; t from 0 to 1.
  return { hex = function(t) return hex[index(t)] end, bytes = function(t) return bytes[index(t)] end, is_light = function(t) return light[index(t)] end }
end

local made = {}
local functions = { sequential = sequential, diverging = diverging }
-- The scale of a name.
function colours.scale(name, op)
  if not functions[name] then moe.fail { op = op .. ": palette", got = tostring(name), want = '"sequential" or "diverging"' } end
  made[name] = made[name] or ramp(functions[name])
  return made[name]
end

function colours.of(i) return colours.series[(i - 1) % #colours.series + 1] end

return colours

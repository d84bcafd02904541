-- A list of primitives, and the picture that is made of it: one list, two writers (SVG here, PNG in moe.draw).
local colours = require "moe.plot.colours"

local FONT = "'DejaVu Sans', Verdana, 'Helvetica Neue', Arial, sans-serif"

local Sheet = {}
Sheet.__index = Sheet

function Sheet.new() return setmetatable({ items = {} }, Sheet) end

function Sheet:add(kind, item)
  item.kind = kind
  item.clip = self.clip
  self.items[#self.items + 1] = item
  return item
end
function Sheet:text(x, y, text, options)
  local item = { x = x, y = y, text = tostring(text), size = 12, fill = colours.ink }
  for key, value in pairs(options or {}) do item[key] = value end
  return self:add("text", item)
end
function Sheet:line(x1, y1, x2, y2, stroke, width, dash) return self:add("path", { points = { x1, y1, x2, y2 }, stroke = stroke, stroke_width = width or 1, dash = dash }) end
function Sheet:rect(x, y, width, height, item)
  item.x, item.y, item.width, item.height = x, y, width, height
  return self:add("rect", item)
end

-- --- SVG ---

local function escape(text)
  return (tostring(text):gsub("[%z\1-\8\11\12\14-\31]", "\u{fffd}"):gsub("[&<>\"]", { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end
local function num(x) return (("%.2f"):format(x):gsub("%.?0+$", "")) end

local function attributes(item, first)
  local out = { first }
  local function put(name, value) if value then out[#out + 1] = name .. '="' .. value .. '"' end end
  put("fill", item.fill or "none")
  if item.stroke then
    put("stroke", item.stroke)
    put("stroke-width", num(item.stroke_width or 1))
  end
  if item.dash then
    local dash = {}
    for i, d in ipairs(item.dash) do dash[i] = num(d) end
    put("stroke-dasharray", table.concat(dash, " "))
  elseif item.kind == "path" and item.stroke then
    put("stroke-linejoin", "round")
    put("stroke-linecap", "round")
  end
  put("opacity", item.opacity and num(item.opacity))
  return table.concat(out, " ")
end

local function finish(item, tag, first)
  local head = "<" .. tag .. " " .. attributes(item, first)
  return item.title and head .. "><title>" .. escape(item.title) .. "</title></" .. tag .. ">" or head .. "/>"
end

local writers = {}
function writers.path(item)
  local list = {}
  for i = 1, #item.points, 2 do list[#list + 1] = num(item.points[i]) .. "," .. num(item.points[i + 1]) end
  return finish(item, (item.closed or item.fill) and "polygon" or "polyline", 'points="' .. table.concat(list, " ") .. '"')
end
function writers.rect(item) return finish(item, "rect", ('x="%s" y="%s" width="%s" height="%s"'):format(num(item.x), num(item.y), num(item.width), num(item.height))) end
function writers.circle(item) return finish(item, "circle", ('cx="%s" cy="%s" r="%s"'):format(num(item.x), num(item.y), num(item.radius))) end
function writers.text(item)
  return ('<text x="%s" y="%s" font-size="%s" fill="%s"%s%s%s%s>%s</text>'):format(num(item.x), num(item.y), num(item.size), item.fill,
    item.anchor and item.anchor ~= "start" and (' text-anchor="%s"'):format(item.anchor) or "", item.bold and ' font-weight="700"' or "",
    item.turn and (' transform="rotate(%s %s %s)"'):format(num(item.turn), num(item.x), num(item.y)) or "", item.opacity and (' opacity="%s"'):format(num(item.opacity)) or "", escape(item.text))
end
function writers.cells(item)
  return ('<image x="%s" y="%s" width="%s" height="%s" preserveAspectRatio="none" style="image-rendering:pixelated" href="%s"/>'):format(num(item.x), num(item.y), num(item.width), num(item.height),
    moe.draw.data_uri(item.rgb, item.cols, item.rows))
end

-- A clipped piece is an <svg> inside: it needs no id, of which a page with several pictures would have each twice.
local function to_svg(items, width, height)
  local out = { ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="%s">'):format(width, height, width, height, FONT),
    ('<rect width="%d" height="%d" fill="%s"/>'):format(width, height, colours.paper) }
  local clip
  for _, item in ipairs(items) do
    if item.clip ~= clip then
      if clip then out[#out + 1] = "</svg>" end
      clip = item.clip
      if clip then
        local x, y, w, h = num(clip[1]), num(clip[2]), num(clip[3]), num(clip[4])
        out[#out + 1] = ('<svg x="%s" y="%s" width="%s" height="%s" viewBox="%s %s %s %s">'):format(x, y, w, h, x, y, w, h)
      end
    end
    out[#out + 1] = writers[item.kind](item)
  end
  if clip then out[#out + 1] = "</svg>" end
  out[#out + 1] = "</svg>\n"
  return table.concat(out, "\n")
end

-- --- the picture ---

local Picture = { __name = "plot" }
local lazy = {}
function lazy.svg(p) return to_svg(p.primitives, p.width, p.height) end
function lazy._repr(p) return { ["image/svg+xml"] = p.svg, ["image/png"] = p:png() } end

Picture.__index = function(p, key)
  if Picture[key] then return Picture[key] end
  if not lazy[key] then return nil end
  rawset(p, key, lazy[key](p))
  return rawget(p, key)
end
Picture.__tostring = function(p) return ("plot: %d x %d, %s"):format(p.width, p.height, rawget(p, "saved_as") and "saved as " .. p.saved_as or 'save it with :save("x.svg") or :save("x.png")') end

function Picture:png(options)
  options = moe.check_keys(options or {}, { "scale" }, "plot:png: options")
  return moe.draw.png(self.primitives, { width = self.width, height = self.height, scale = options.scale or 2 })
end
moe.document(Picture.png, "plot:png", "p:png {scale = 2}: the picture as bytes of a PNG file, `scale` pixels a unit of p.width.")

function Picture:save(path, options)
  if type(path) ~= "string" then moe.fail { op = "plot:save: path", got = type(path), want = "a file name that ends in .svg or .png" } end
  local ending = path:lower():match("%.(%w+)$")
  if ending == "png" then moe.fs.write(path, self:png(options))
  elseif ending == "svg" then
    moe.check_keys(options or {}, {}, "plot:save: options of SVG")
    moe.fs.write(path, self.svg)
  else moe.fail { op = "plot:save: path", got = '"' .. path .. '"', want = "a file name that ends in .svg or .png" } end
  rawset(self, "saved_as", path)
  return self
end
moe.document(Picture.save, "plot:save", 'p:save(path, {scale = 2}): writes the picture as SVG or, with `scale` pixels a unit, as PNG, by the path\'s ending. Returns p.')

function Sheet:picture(width, height, panels)
  return setmetatable({ width = math.ceil(width), height = math.ceil(height), primitives = self.items, panels = panels }, Picture)
end
Picture.__methods = { png = Picture.png, save = Picture.save }
moe.document(Picture, "plot", "plot: a picture, as viz.line and the others give it. Fields: width, height, svg, saved_as (the path of the last save).")
Sheet.Picture = Picture

return Sheet

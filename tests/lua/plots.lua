local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

-- A fill of the picture at a point, as "#rrggbb".
local function colour_at(p, x, y, scale)
  local pixels = moe.draw.decode(p:png { scale = scale or 1 })
  local c = pixels[math.floor(y * (scale or 1))][math.floor(x * (scale or 1))]:to_table()
  return ("#%02x%02x%02x"):format(c[1], c[2], c[3])
end
local function count(text, pattern) return select(2, text:gsub(pattern, "")) end
local function primitives(p, kind)
  local list = {}
  for _, item in ipairs(p.primitives) do
    if item.kind == kind then list[#list + 1] = item end
  end
  return list
end
-- Every text lies on the sheet, and no two that stand upright touch.
local function check_texts(p)
  local boxes = {}
  for _, t in ipairs(primitives(p, "text")) do
    local w = moe.draw.text_width(t.text, t.size, t.bold)
    if not t.turn then
      local x = t.anchor == "end" and t.x - w or t.anchor == "middle" and t.x - w / 2 or t.x
      is(x >= -0.5 and x + w <= p.width + 0.5 and t.y - t.size * 0.8 >= 0 and t.y <= p.height, ("%q leaves the sheet"):format(t.text))
      for _, b in ipairs(boxes) do
        is(x >= b.x2 or x + w <= b.x1 or t.y - t.size * 0.75 >= b.y2 or t.y <= b.y1, ("%q and %q touch"):format(t.text, b.text))
      end
      boxes[#boxes + 1] = { x1 = x, x2 = x + w, y1 = t.y - t.size * 0.75, y2 = t.y, text = t.text }
    end
  end
end

test("plots: curves are well-formed and labelled", function()
  local p = viz.line { { name = "a <b>", y = { 3, 2, 1.5 } }, { name = "b", x = { 1, 10 }, y = moe.tensor { 2.0, 1.0 } }, title = "Loss & more", x_label = "step", y_label = "nats", log_y = true }
  check.contains(p.svg, "a &lt;b&gt;")
  check.contains(p.svg, "Loss &amp; more")
  is(count(p.svg, "<polyline") >= 2)
  equal(count(p.svg, "<svg"), count(p.svg, "</svg"))
  is(not p.svg:find("nan") and not p.svg:find("inf"))
  check_texts(p)
  local path = check.folder() .. "/p.svg"
  equal(p:save(path), p)
  check.contains(tostring(p), "saved as " .. path)
  equal(moe.fs.read(path), p.svg)
end)

test("plots: PNG has the size and the colours where they should be", function()
  local p = viz.bars({ { name = "a", y = { 2, 4 }, colour = "#ff0000" }, { name = "b", y = { 1, 3 }, colour = "#0000ff" } }, { categories = { "x", "y" }, width = 400, height = 300 })
  local path = check.folder() .. "/p.png"
  p:save(path, { scale = 3 })
  local shape = moe.draw.decode(moe.fs.read(path)).shape
  equal(table.concat(shape, ","), "900,1200,3")
  local bars = 0
  for _, r in ipairs(primitives(p, "rect")) do
    if r.title then
      bars = bars + 1
      equal(colour_at(p, r.x + r.width / 2, r.y + r.height / 2), r.fill)
      equal(colour_at(p, r.x + r.width / 2, r.y - 2) ~= r.fill, true)
    end
  end
  equal(bars, 4)
  local repr = p._repr
  equal(repr["image/png"], p:png())
  equal(repr["image/svg+xml"], p.svg)
  raises("usage", function() p:save("x.jpg") end, ".svg or .png")
  raises("usage", function() p:png { scale = 1e6 } end, "scale")
  raises("usage", function() p:png { scales = 1 } end, "scale")
end)

test("plots: not finite points are left out, no points are an error", function()
  local p = viz.line { { y = { 1, 0 / 0, math.huge, 2 } } }
  is(not p.svg:find("nan") and not p.svg:find("inf"))
  raises("usage", function() return viz.line { { y = {} } } end)
  raises("shape", function() return viz.line { { x = { 1 }, y = { 1, 2 } } } end, "1 x and 2 y")
  raises("usage", function() return viz.line { { y = { 1 } }, titel = "x" } end, 'did you mean "title"?')
  raises("usage", function() return viz.line { { y = { 1 }, nmae = "x" } } end, 'did you mean "name"?')
  raises("shape", function() return viz.line { { y = { 1, "2" } } } end, "value 2")
  raises("usage", function() return viz.line({ { y = { 1, 2 } } }, { width = 5 }) end, "120")
  raises("usage", function() return viz.line({ { y = { 1, 2 } } }, { y_min = 3, y_max = 2 }) end, "lower")
  is(viz.line { { y = { 5 } } }.svg:find("<circle"))
  is(viz.line { { y = { 5, 5, 5 } } }.svg:find("<polyline"))
end)

test("plots: bands, bars of error, events, levels, limits", function()
  local p = viz.line({ { name = "m", y = { 3, 2, 1 }, error = { 0.5, 0.4, 0.3 } } }, { events = { { x = 2, text = "mask" }, { x = 2.1, text = "a longer text" }, 2.9 }, levels = { { y = 2, text = "floor" } }, y_min = 0, y_max = 4 })
  equal(count(p.svg, "<polygon"), 1)
  check.contains(p.svg, ">mask<")
  check.contains(p.svg, ">floor<")
  check_texts(p)
  local band
  for _, item in ipairs(primitives(p, "path")) do band = item.fill and item or band end
  equal(#band.points, 12)
  is(band.points[2] > band.points[12])          -- low is below high
  equal(count(viz.line({ { y = { 3, 2, 1 }, low = { 2, 1, 0 }, high = { 4, 3, 2 }, whiskers = true } }).svg, "<polygon"), 0)
  raises("usage", function() return viz.line { { y = { 1 }, low = { 0 } } } end, "without high")
  raises("shape", function() return viz.line { { y = { 1, 2 }, error = { 0 } } } end, "1 values")
  raises("usage", function() return viz.line({ { y = { 1 } } }, { events = { "x" } }) end, "events 1")
end)

test("plots: ticks are round and stay apart", function()
  for _, range in ipairs { { 0, 1 }, { -3, 7.3 }, { 1e-7, 9e-7 }, { 12000, 980000 }, { 1e9, 4e9 }, { 2.00001, 2.00002 }, { -1e-3, 1e-3 } } do
    for _, log in ipairs { false, range[1] > 0 } do
      local p = viz.line({ { x = { range[1], range[2] }, y = { range[1], range[2] } } }, { log_x = log, log_y = log, width = 420, x_label = "x", y_label = "y" })
      check_texts(p)
      is(#primitives(p, "text") >= 5)
    end
  end
end)

test("plots: long curves keep their extremes", function()
  local y = {}
  for i = 1, 20000 do y[i] = 1 end
  y[7777] = 50
  local p = viz.line { { y = y }, y_min = 0 }
  is(#p.svg < 60000)
  local top = math.huge
  for _, item in ipairs(primitives(p, "path")) do
    if item.stroke_width == 2 then
      for i = 2, #item.points, 2 do top = math.min(top, item.points[i]) end
    end
  end
  is(top < p.height * 0.2)
end)

test("plots: scatter, bars and histograms", function()
  local p = viz.scatter({ { name = "a", x = { 1, 2 }, y = { 3, 4 }, labels = { "one", "two" } } }, { log_x = true })
  is(count(p.svg, "<circle") == 2)
  check.contains(p.svg, ">two<")
  local names = { "a long category", "another long one", "x", "a name that is so long that nobody can read it in a plot" }
  local bars = viz.bars({ { y = { 1, -2, 3, 0 } } }, { categories = names, width = 360 })
  check_texts(bars)
  equal(count(bars.svg, "rotate%(%-45"), 4)
  raises("shape", function() return viz.bars({ { y = { 1 } } }, { categories = { "a", "b" } }) end, "1 values")
  raises("usage", function() return viz.bars({ { y = { 1 } } }, { categories = {} }) end)
  local values = { 1, 1, 2, 3, 3, 3 }
  local h = viz.histogram(values)
  local heights = {}
  for _, r in ipairs(primitives(h, "rect")) do
    if r.title then heights[#heights + 1] = r.height end
  end
  equal(#heights, 3)
  near(heights[1] / heights[3], 2 / 3, 1e-9)
  near(heights[2] / heights[3], 1 / 3, 1e-9)
  is(viz.histogram(moe.randn { 10, 10 }, { bins = 7, density = true }))
  is(viz.histogram({ { name = "a", y = { 0, 1 } }, { name = "b", y = { 2, 3 } } }).svg:find(">b<"))
  raises("usage", function() return viz.histogram({ 0 / 0 }) end, "no finite")
  raises("usage", function() return viz.histogram({ 1 }, { bins = 0 }) end)
end)

test("plots: labels of dots stay in the picture and there is one for each dot", function()
  local function labelled(options) return viz.scatter({ { x = { 1, 2, 3 }, y = { 3, 4, 1 }, labels = { "alpha", "beta", "gamma" } } }, options) end
  for _, p in ipairs { labelled(), labelled { width = 200, height = 150 }, labelled { y_min = 1, y_max = 4, x_min = 1, x_max = 3 } } do
    check_texts(p)
    local seen = 0
    for _, t in ipairs(primitives(p, "text")) do
      if t.clip then
        local x, y, w, h = table.unpack(t.clip)
        seen = seen + 1
        is(t.x >= x and t.x + moe.draw.text_width(t.text, t.size) <= x + w and t.y - t.size * 0.8 >= y and t.y <= y + h, t.text .. " is cut")
      end
    end
    equal(seen, 3)
  end
  equal(count(labelled({ x_max = 2.5 }).svg, ">gamma<"), 0)       -- its dot is outside, too
  raises("shape", function() return viz.scatter { { x = { 1, 2, 3 }, y = { 3, 4, 1 }, labels = { "a", "b" } } } end, "2 labels", "3, one a point")
  raises("usage", function() return viz.scatter { { y = { 3 }, labels = "a" } } end, "labels")
end)

test("plots: heat maps, small multiples on one scale", function()
  local m = moe.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
  local p = viz.heatmap(m, { title = "load", rows = { "c++", "text" }, scale_label = "tokens", values = true, format = "%d" })
  equal(count(p.svg, "<title>"), 6)
  check.contains(p.svg, ">6<")
  check_texts(p)
  local cells = {}
  for _, r in ipairs(primitives(p, "rect")) do
    if r.title then cells[#cells + 1] = r end
  end
  equal(colour_at(p, cells[6].x + 2, cells[6].y + 2), cells[6].fill)
  is(cells[1].fill ~= cells[6].fill)
  local panels = viz.heatmap(moe.stack { m, m + 1 }, { titles = { "layer 1", "layer 2" } })
  equal(count(panels.svg, "<title>"), 12)
  check.contains(panels.svg, "layer 2")
  local around = viz.heatmap({ { 0.5, 1, 3 } }, { centre = 1, values = false })
  local fills = {}
  for _, r in ipairs(primitives(around, "rect")) do
    if r.title then fills[#fills + 1] = r.fill end
  end
  local function blue_over_red(hex) return tonumber(hex:sub(6, 7), 16) - tonumber(hex:sub(2, 3), 16) end
  is(blue_over_red(fills[1]) > 10 and blue_over_red(fills[3]) < -50 and math.abs(blue_over_red(fills[2])) < 10)
  raises("shape", function() return viz.heatmap { 1, 2 } end)
  raises("shape", function() return viz.heatmap { { 1, 2 }, { 3 } } end)
  raises("usage", function() return viz.heatmap({ { 1 } }, { palette = "rainbow" }) end, "diverging")
  is(not viz.heatmap({ { 0 / 0, 1 } }).svg:find('"nan"'))
  is(viz.heatmap({ { 2, 2 } }).svg:find("<rect"))
  local large = viz.heatmap(moe.rand { 60, 256 }, { row_label = "layer", col_label = "expert" })
  equal(count(large.svg, "<image"), 2)          -- the cells and the colour bar
  is(#large.svg < 200000)
  check_texts(large)
end)

test("plots: panels share axes and one legend", function()
  local function one(k) return viz.line({ { name = "bias", y = { k, 1 } }, { name = "aux", y = { 1, k } } }, { x_label = "step", y_label = "loss" }) end
  local p = viz.panels({ one(2), one(3), one(4), one(5) }, { titles = { "a", "b", "c", "d" }, title = "Loss" })
  equal(count(p.svg, ">bias<"), 1)
  equal(count(p.svg, ">loss<"), 2)              -- at the left panels only
  equal(count(p.svg, ">step<"), 2)
  check_texts(p)
  local own = viz.panels({ one(2), one(3) }, { share_y = false })
  equal(count(own.svg, ">loss<"), 2)
  local scale = viz.heatmap({ { 0.69, 0.7, 0.9 }, { 1.0, 1.1, 1.21 } }, { values = false }).svg
  is(scale:find(">0.8<", 1, true) and scale:find(">1.0<", 1, true) and scale:find(">1.2<", 1, true), "a scale has more than one number")
  is(viz.panels({ one(2), viz.heatmap { { 1, 2 } } }).svg:find("<svg"))
  check.contains(viz.panels({ one(2), title = "Behind" }).svg, ">Behind<")
  raises("usage", function() return viz.panels { one(2), titel = "x" } end, 'did you mean "title"?')
  raises("usage", function() return viz.panels({ one(2), titel = "x" }, { title = "y" }) end, 'did you mean "title"?')
  raises("usage", function() return viz.panels {} end)
  raises("usage", function() return viz.panels({ one(2) }, "x") end, "viz.panels: options")
  raises("usage", function() return viz.panels { 1 } end, "plot 1")
end)

test("arrays: names, selection, arithmetic, files, plots", function()
  local a = moe.array({ { 1, 2, 3 }, { 4, 5, 6 } }, { dims = { "domain", "expert" }, labels = { domain = { "code", "text" } }, name = "tokens" })
  equal(a:select("domain", "text"):select("expert", 2), 6)
  equal(a:select(0, "code")[1], 2)
  equal(a[-1][0], 4)
  equal(#a, 2)
  equal(a:sum():item(), 21)
  equal(table.concat(a.shape, ","), "2,3")
  equal((2 * a):select("domain", "code")[2], 6)
  near((a / a:sum(1, { keepdim = true })):select("domain", "code")[0], 1 / 6, 1e-6)
  equal(a:rows()[6].value, 6)
  equal(a:rows()[4].domain, "text")
  check.contains(tostring(a), "tokens [domain 2, expert 3]")
  check.contains(tostring(a), "text")
  check.contains(tostring(moe.array(moe.zeros { 100, 2, 30 })), "…")
  local folder = check.folder()
  a:save(folder .. "/a.csv"):save(folder .. "/a.json"):save(folder .. "/a.npy")
  equal(moe.fs.read(folder .. "/a.csv"):match("^[^\n]*\n[^\n]*"), "domain,expert,tokens\ncode,0,1")
  local json = moe.json.decode(moe.fs.read(folder .. "/a.json"))
  equal(json.labels.domain[2] .. json.values[2][3], "text6")
  local npy = moe.load_npy(folder .. "/a.npy")
  is(npy.dtype == a.tensor.dtype and npy:eq(a.tensor):all())
  moe.array(moe.tensor(2.5, { dtype = "bf16" })):save(folder .. "/a.npy"):save(folder .. "/a.csv")       -- no dims
  is(#moe.load_npy(folder .. "/a.npy").shape == 0 and moe.load_npy(folder .. "/a.npy"):item() == 2.5)
  equal(moe.fs.read(folder .. "/a.csv"), "value\n2.5\n")
  moe.array({ 1, 0 / 0 }, { dims = { "a,b" }, labels = { ["a,b"] = { 'x "1"', 2 } } }):save(folder .. "/a.csv")
  equal(moe.fs.read(folder .. "/a.csv"), '"a,b",value\n"x ""1""",1\n2,nan\n')
  check.contains(a:plot().svg, "code")
  is(a:plot { kind = "line" } and a:plot { kind = "bars" } and a:select("domain", "code"):plot())
  is(viz.heatmap(a, { title = "x" }).svg:find(">expert<"))
  is(viz.line { { y = a[0] } } and viz.line(a[0]) and viz.line({ a[0], a[1] }) and viz.line { 1, 2, 3 } and viz.histogram(a) and viz.line(moe.tensor { 1, 2 }))
  is(moe.array(moe.rand { 2, 3, 4 }):plot())
  raises("config", function() return a:select("domain", "none") end, "code, text")
  raises("usage", function() return a:select("domian", "code") end, 'did you mean "domain"?')
  raises("shape", function() return a[2] end, "0-based")
  raises("shape", function() return moe.array({ 1, 2 }, { dims = { "a", "b" } }) end, "2 names")
  raises("shape", function() return moe.array({ 1, 2 }, { dims = { "a" }, labels = { a = { 1 } } }) end, "1 labels")
  raises("usage", function() return a:save("a.txt") end, ".csv")
  raises("usage", function() return moe.array(print) end)
end)

test("tables: aligned, numbers right", function()
  local text = tostring(moe.table({ { name = "a", loss = 1.5 }, { name = "bcd", loss = 10.25 } }, { columns = { "name", "loss" }, formats = { loss = "%.2f" } }))
  equal(text, "name   loss\n----  -----\na      1.50\nbcd   10.25")
  equal(tostring(moe.table({ { 1, "x" }, { 20, "y" } })), " 1  x\n20  y")
  raises("usage", function() return moe.table(3) end)
end)

test("progress: lines with what is done", function()
  local p = moe.progress(10, { label = "steps" })
  p:update(5, "half")
  p:done()
end)

test("json: round trips, order, null, errors with a line", function()
  local text = '{"b":1,"a":[1,2.5,null,true,"x"],"c":{},"d":[]}'
  local value = moe.json.decode(text)
  equal(value.a[3], moe.null)
  equal(moe.json.encode(value), text)
  raises("data", function() return moe.json.decode("{\n\"a\": }", "f.json") end, "f.json:2")
  raises("usage", function() return moe.json.encode(print) end)
  local loop = {}
  loop.loop = loop
  raises("usage", function() return moe.json.encode(loop) end, "contains itself")
end)

check.done()

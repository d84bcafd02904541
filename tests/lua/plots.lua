local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

test("plots: curves are well-formed and labelled", function()
  local p = viz.line { { name = "a <b>", y = { 3, 2, 1.5 } }, { name = "b", x = { 1, 10 }, y = moe.tensor { 2.0, 1.0 } }, title = "Loss & more", x_label = "step", y_label = "nats", log_y = true }
  check.contains(p.svg, "a &lt;b&gt;")
  check.contains(p.svg, "Loss &amp; more")
  equal(select(2, p.svg:gsub("<polyline", "")), 2)
  is(not p.svg:find("nan") and not p.svg:find("inf"))
  local path = check.folder() .. "/p.svg"
  p:save(path)
  equal(moe.fs.read(path), p.svg)
end)

test("plots: not finite points are left out, no points are an error", function()
  local p = viz.line { { y = { 1, 0 / 0, math.huge, 2 } } }
  is(not p.svg:find("nan") and not p.svg:find("inf"))
  raises("usage", function() return viz.line { { y = {} } } end)
  raises("shape", function() return viz.line { { x = { 1 }, y = { 1, 2 } } } end, "1 x and 2 y")
  raises("usage", function() return viz.line { { y = { 1 } }, titel = "x" } end, 'did you mean "title"?')
  is(viz.line { { y = { 5 } } }.svg:find("<circle"))
  is(viz.line { { y = { 5, 5, 5 } } }.svg:find("<polyline"))
end)

test("plots: long curves keep their extremes", function()
  local y = {}
  for i = 1, 20000 do y[i] = 1 end
  y[7777] = 50
  local p = viz.line { { y = y }, y_min = 0 }
  is(#p.svg < 60000)
  check.contains(p.svg, ",40 ")    -- the top of the plot is reached
end)

test("plots: heat maps, small multiples on one scale", function()
  local m = moe.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
  local p = viz.heatmap(m, { title = "load", rows = { "c++", "text" }, scale_label = "tokens", values = true, format = "%d" })
  equal(select(2, p.svg:gsub("<title>", "")), 6)
  local panels = viz.heatmap(moe.stack { m, m + 1 }, { titles = { "layer 1", "layer 2" } })
  equal(select(2, panels.svg:gsub("<title>", "")), 12)
  check.contains(panels.svg, "layer 2")
  raises("shape", function() return viz.heatmap { 1, 2 } end)
  raises("shape", function() return viz.heatmap { { 1, 2 }, { 3 } } end)
  is(not viz.heatmap({ { 0 / 0, 1 } }).svg:find('"nan"'))
  is(viz.heatmap({ { 2, 2 } }).svg:find("<rect"))
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

-- Parts of tensors, read and written, against plain loops over tables.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, is, raises = check.test, check.equal, check.is, check.raises

local function flat(t) return table.concat(t:reshape { -1 }:to_table(), ",") end
local function shape(t) return tostring(t.shape) end
local function grid() return moe.arange(12):reshape { 3, 4 } end

test("index: integers, negative ones, one after another and together", function()
  local t = grid()
  equal(t[1][2]:item(), 6)
  equal(t[-1][-1]:item(), 11)
  equal(t { 1, 2 }:item(), 6)
  equal(t(1, 2):item(), 6)
  equal(t[{ -1, 0 }]:item(), 8)
  raises("shape", function() return t[3] end, "0 … 2")
  raises("shape", function() return t { 0, 4 } end, "[3, 4]")
  raises("shape", function() return t { 0, 0, 0 } end)
end)

test("index: ranges as text", function()
  local t = grid()
  equal(flat(t["1:3"]), "4,5,6,7,8,9,10,11")
  equal(flat(t["1:3, ::2"]), "4,6,8,10")
  equal(flat(t["…, -1"]), "3,7,11")
  equal(flat(t["..., 1:"]), "1,2,3,5,6,7,9,10,11")
  equal(flat(t[":, 2"]), "2,6,10")
  equal(flat(t["-2:"]), "4,5,6,7,8,9,10,11")
  equal(flat(t["0"]), "0,1,2,3")
  equal(shape(t["new, 0"]), "[1, 4]")
  equal(shape(t { "…", "new" }), "[3, 4, 1]")
  equal(flat(t { 1, "1:3" }), "5,6")
  equal(shape(t["5:9"]), "[0, 4]")
  raises("usage", function() return t["1:2:0"] end, "step above 0")
  raises("usage", function() return t["::-1"] end, "flip")
  raises("usage", function() return t["1;2"] end, "1;2")
  raises("usage", function() return t["1:2:3:4"] end)
  raises("usage", function() return t["99999999999999999999"] end)
  raises("shape", function() return t["7"] end, "[3, 4]")
end)

test("index: views share memory, picks do not", function()
  local t = grid()
  t[":, 1"][0] = 99
  equal(t { 0, 1 }:item(), 99)
  local picked = t[moe.tensor { 0 }]
  picked[0] = 0
  equal(t { 0, 1 }:item(), 99)
end)

test("index: masks and ids", function()
  local t = grid()
  equal(flat(t[t:gt(8)]), "9,10,11")
  equal(flat(t[moe.tensor { 2, 0 }]), "8,9,10,11,0,1,2,3")
  equal(flat(t[moe.tensor({ 2, 0 }, { dtype = "int32" })]), "8,9,10,11,0,1,2,3")
  equal(flat(t { { 2, 0 }, { 1, 3 } }), "9,3")
  equal(flat(t { ":", { 3, 0 } }), "3,0,7,4,11,8")
  equal(flat(t[moe.tensor { true, false, true }]), "0,1,2,3,8,9,10,11")
  equal(flat(t[moe.tensor({ 1, 0, 1 }, { dtype = "uint8" })]), "4,5,6,7,0,1,2,3,4,5,6,7", "uint8 are ids")
  equal(shape(t[moe.zeros({ 0 }, { dtype = "int64" })]), "[0, 4]")
  raises("dtype", function() return t[moe.tensor { 0.5 }] end, "float32")
  raises("shape", function() return t[moe.tensor { 3 }] end)
  raises("shape", function() return t[moe.tensor { true, false }] end, "[3, 4]")
  raises("usage", function() return t[{}] end)
  raises("usage", function() return t[true] end)
  raises("usage", function() return t { function() end } end, "a function")
  raises("usage", function() return t[nil] end)
end)

test("index: assignment to all of these", function()
  local t = moe.zeros { 3, 4 }
  t[0] = 1
  t["1:, 0"] = moe.tensor { 2, 3 }
  t { 0, 0 }:fill_(9)
  t[{ 2, 3 }] = 5
  t[{ 1, "1:3" }] = { 7, 8 }
  equal(table.concat(t:reshape({ -1 }):long():to_table(), ","), "9,1,1,1,2,7,8,0,3,0,0,5")
  t[t:gt(6)] = -1
  equal(t:long():sum():item(), -1 + 3 + 2 - 1 - 1 + 3 + 5)
  t[moe.tensor { 0, 2 }] = moe.ones { 2, 4 }
  equal(t[0]:sum():item(), 4)
  t["…"] = 0
  is(not t:any())
  local flags = moe.zeros({ 3 }, { dtype = "bool" })
  flags[1] = true
  equal(flags:long():sum():item(), 1)
  raises("shape", function() t[0] = moe.ones { 5 } end, "[3, 4]")
  raises("shape", function() t["1:, 0"] = moe.ones { 3 } end)
  raises("usage", function() t[0] = "x" end, '"x"')
  raises("usage", function() t[0] = nil end, "nil")
  raises("usage", function() t.shape = 3 end, "an index")
  raises("shape", function() t[3] = 0 end, "0 … 2")
end)

test("index: gradients go through parts", function()
  local x = moe.ones({ 3, 4 }, { dtype = "fp64", requires_grad = true })
  local y = (x["1:, ::2"] * 2 + x { 0, "1:3" }:sum()):sum()
  y:backward()
  equal(flat(x.grad), "0.0,4.0,4.0,0.0,2.0,0.0,2.0,0.0,2.0,0.0,2.0,0.0")
end)

check.done()

local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

test("tensors: made from tables with PyTorch's types", function()
  equal(moe.tensor({ { 1, 2 }, { 3, 4 } }).dtype, "int64")
  equal(moe.tensor({ 1, 2.5 }).dtype, "float32")
  equal(moe.tensor({ true, false }).dtype, "bool")
  local t = moe.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { dtype = "fp64" })
  equal(t.dtype, "float64")
  equal(table.concat(t.shape, ","), "2,3")
  equal(t:size(1), 3)
  equal(t[1][2]:item(), 6)
  equal(#t, 2)
end)

test("tensors: rows of different length are refused", function()
  raises("shape", function() return moe.tensor { { 1, 2 }, { 3 } } end, "rows of 2 and of 1")
  raises("shape", function() return moe.tensor { { 1, 2 }, 3 } end)
  raises("usage", function() return moe.tensor { "a" } end, '"a"')
end)

test("tensors: arithmetic agrees with numbers, on either side", function()
  local a = moe.tensor { 1.0, 2.0, 4.0 }
  local function same(t, list) for i, v in ipairs(list) do near(t[i - 1]:item(), v, 1e-6) end end
  same(a + 1, { 2, 3, 5 })
  same(10 - a, { 9, 8, 6 })
  same(a * a, { 1, 4, 16 })
  same(8 / a, { 8, 4, 2 })
  same(a ^ 2, { 1, 4, 16 })
  same(2 ^ a, { 2, 4, 16 })
  same(-a, { -1, -2, -4 })
  same(a % 3, { 1, 2, 1 })
  same(a // 2, { 0, 1, 2 })
  equal((moe.tensor({ 1.0 }, { dtype = "bf16" }) * 0.5).dtype, "bfloat16", "a number does not widen a tensor")
  equal((moe.tensor { 1, 2 } + 1).dtype, "int64")
end)

test("tensors: comparisons give booleans in Lua, elements by name", function()
  local a, b = moe.tensor { 1.0, 2.0 }, moe.tensor { 1.0, 3.0 }
  equal(a == b, false)
  equal(a == a, true)
  raises("usage", function() return a < b end, "a:lt(b)")
  equal(a:eq(b):sum():item(), 1)
  equal(a:lt(b):sum():item(), 1)
  equal(a:eq(b).dtype, "bool")
end)

test("tensors: matmul against a plain loop, odd sizes", function()
  moe.seed(7)
  local a, b = moe.randn({ 3, 5 }, { dtype = "fp64" }), moe.randn({ 5, 7 }, { dtype = "fp64" })
  local x, y, c = a:to_table(), b:to_table(), a:matmul(b)
  is(c:is_finite())
  for i = 1, 3 do
    for j = 1, 7 do
      local sum = 0
      for k = 1, 5 do sum = sum + x[i][k] * y[k][j] end
      near(c[i - 1][j - 1]:item(), sum, 1e-12)
    end
  end
  raises("shape", function() return a:matmul(a) end, "[3, 5]")
  raises("dtype", function() return a:matmul(b:to("fp32")) end)
end)

test("tensors: reductions along dims", function()
  local t = moe.tensor { { 1, 5, 3 }, { 4, 2, 6 } }
  equal(t:sum():item(), 21)
  equal(t:sum(0)[1]:item(), 7)
  near(t:mean(1)[0]:item(), 3)
  equal(t:max():item(), 6)
  equal(t:min(1)[1]:item(), 2)
  equal(t:argmax(1)[0]:item(), 1)
  equal(table.concat(t:sum(1, { keepdim = true }).shape, ","), "2,1")
  near(t:to("fp64"):softmax(-1)[0]:sum():item(), 1, 1e-12)
  near(moe.tensor({ 3.0, 4.0 }):norm():item(), 5)
  raises("shape", function() return t:sum(2) end, "2 of [2, 3]")
  raises("shape", function() return moe.zeros({ 0 }):max() end)
end)

test("tensors: views, shapes and copies", function()
  local t = moe.arange(12):reshape { 3, -1 }
  equal(table.concat(t.shape, ","), "3,4")
  equal(t.T:reshape { 12 }[1]:item(), 4)
  equal(t:transpose(0, 1):size(0), 4)
  equal(t:select(1, 2)[1]:item(), 6)
  equal(t:narrow(0, 1, 2)[0][0]:item(), 4)
  raises("shape", function() return t:reshape { 5, 2 } end, "12")
  raises("shape", function() return t:select(0, 3) end, "0-based")
  local c = t:clone()
  c[0] = 9
  equal(t[0][1]:item(), 1)
  equal(c[0][1]:item(), 9)
  is(t:to("fp32"):allclose(t:to("fp32") + 1e-9))
end)

test("tensors: 0-based elements, and ipairs says so", function()
  local t = moe.arange(3)
  raises("shape", function() return t[3] end, "0 … 2")
  raises("usage", function() for _ in ipairs(t) do end end, "0-based")
end)

test("tensors: integral floats are integers", function()
  equal(moe.zeros({ 2 ^ 3 }):numel(), 8)
  raises("usage", function() return moe.zeros { 2.5 } end, "an integer")
  raises("shape", function() return moe.zeros { -1 } end)
end)

test("tensors: wrong names of types and devices", function()
  raises("dtype", function() return moe.zeros({ 1 }, { dtype = "bf61" }) end, 'did you mean "bf16"?')
  raises("device", function() return moe.zeros({ 1 }, { device = "gpu" }) end, "cpu")
  raises("usage", function() return moe.zeros({ 1 }, { dtpye = "bf16" }) end, 'did you mean "dtype"?')
end)

test("tensors: methods of a freed one, unknown methods, calls with a dot", function()
  local t = moe.zeros { 4 }
  t:free()
  raises("state", function() return t:sum() end, "freed")
  raises("state", function() return t + 1 end, "freed")
  equal(tostring(t), "tensor (freed)")
  t:free()
  raises("usage", function() return moe.zeros { 1 }:summ() end, 'did you mean "sum"?')
  raises("usage", function() return moe.zeros({ 1 }).sum(3) end, "a tensor")
end)

test("tensors: one that no memory has room for says who asked, for how much, and what is free", function()
  local err = raises("memory", function() return moe.zeros { 2 ^ 50 } end, "moe.zeros: out of memory", "got 4194304.00 GiB", "free on this host", ":free()")
  check.contains(err.want, (moe.format_bytes(moe.host_memory().available):match("%a+$")))
  equal(moe.ones({ 3 }):sum():item(), 3.0)
end)

test("tensors: <close> gives the memory back", function()
  local kept
  do
    local t <close> = moe.zeros { 4 }
    kept = t
  end
  raises("state", function() return kept:sum() end, "freed")
end)

test("tensors: a loop over large ones does not fill the memory", function()
  local function resident()
    local file = io.open("/proc/self/statm")
    local pages = file:read("a"):match("^%d+ (%d+)")
    file:close()
    return pages * 4096 / 2 ^ 20
  end
  local before = resident()
  for _ = 1, 60 do local _ = moe.ones { 4 * 2 ^ 20 } end    -- 16 MiB each, 960 MiB together
  local grown = resident() - before
  is(grown < 320, ("grew by %.0f MiB"):format(grown))
end)

test("tensors: printing shows a header and few values", function()
  local text = tostring(moe.zeros { 100, 100 })
  check.contains(text, "float32")
  check.contains(text, "100")
  is(#text < 1000)
  equal(tostring(moe.zeros { 2, 4, 7 }.shape), "[2, 4, 7]")
end)

check.done()

-- .npy and .npz files, and safetensors, there and back; broken ones are refused.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, is, raises = check.test, check.equal, check.is, check.raises
local folder = check.folder()

test("npy: every dtype and shape comes back", function()
  for _, dtype in ipairs { "fp32", "fp64", "fp16", "int64", "int32", "int16", "int8", "uint8", "bool" } do
    for _, shape in ipairs { {}, { 5 }, { 2, 3 }, { 0, 4 }, { 2, 1, 3 } } do
      local t = (moe.rand(shape) * 10):to(dtype)
      moe.save_npy(folder .. "/x.npy", t)
      local back = moe.load_npy(folder .. "/x.npy")
      equal(back.dtype, t.dtype)
      equal(tostring(back.shape), tostring(t.shape))
      is(back:eq(t):all(), dtype)
    end
  end
  moe.save_npy(folder .. "/x.npy", moe.arange(6):reshape({ 2, 3 }).T)
  equal(moe.load_npy(folder .. "/x.npy")[2][1]:item(), 5)
  raises("dtype", function() moe.save_npy(folder .. "/x.npy", moe.zeros({ 1 }, { dtype = "bf16" })) end, "bfloat16", "float()")
  raises("io", function() moe.save_npy(folder .. "/none/x.npy", moe.zeros { 1 }) end)
  raises("io", function() return moe.load_npy(folder .. "/none.npy") end)
  raises("io", function() return moe.load_npy(folder) end, "a folder")
  raises("io", function() return moe.load_npz(folder) end, "a folder")
end)

test("npy: the bytes are those that NumPy writes", function()
  moe.save_npy(folder .. "/x.npy", moe.tensor({ { 1, 2 } }, { dtype = "fp32" }))
  local bytes = moe.fs.read(folder .. "/x.npy")
  equal(bytes:sub(1, 8), "\x93NUMPY\1\0")
  local length = string.unpack("<I2", bytes, 9)
  equal((10 + length) % 64, 0)
  equal(bytes:sub(11, 10 + length):match("^(.-)%s*\n$"), "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }")
  equal(bytes:sub(11 + length), string.pack("<ff", 1, 2))
end)

test("npy: column order, and files that are broken", function()
  local function file(header, values)
    header = header .. "\n"
    moe.fs.write(folder .. "/y.npy", "\x93NUMPY\1\0" .. string.pack("<I2", #header) .. header .. values)
    return moe.load_npy(folder .. "/y.npy")
  end
  local t = file("{'descr': '<i4', 'fortran_order': True, 'shape': (2, 3), }", string.pack("<i4i4i4i4i4i4", 0, 1, 2, 3, 4, 5))
  equal(table.concat(t:reshape({ -1 }):to_table(), ","), "0,2,4,1,3,5")
  raises("data", function() return file("{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }", "1234") end, "4 bytes")
  raises("dtype", function() return file("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", "1234") end, ">f4")
  raises("data", function() return file("{'fortran_order': False, 'shape': (1,), }", "1234") end, "descr")
  raises("data", function() return file("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", "1234") end, "too large")
  raises("data", function() return file("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4), }", "1234") end)
  moe.fs.write(folder .. "/y.npy", "hello, this is not an array")
  raises("data", function() return moe.load_npy(folder .. "/y.npy") end)
end)

test("npz: tensors by name, and what is wrong with an archive", function()
  local tensors = { weight = moe.randn { 3, 4 }, ids = moe.arange(7), empty = moe.zeros { 0 } }
  moe.save_npz(folder .. "/x.npz", tensors)
  local back, n = moe.load_npz(folder .. "/x.npz"), 0
  for name, t in pairs(back) do
    n = n + 1
    is(t:eq(tensors[name]):all() and t.dtype == tensors[name].dtype, name)
  end
  equal(n, 3)
  local bytes = moe.fs.read(folder .. "/x.npz")
  moe.fs.write(folder .. "/z.npz", bytes:sub(1, -60))
  raises("data", function() return moe.load_npz(folder .. "/z.npz") end)
  local at = bytes:find("NUMPY", 1, true) + 60
  moe.fs.write(folder .. "/z.npz", bytes:sub(1, at - 1) .. string.char(bytes:byte(at) ~ 1) .. bytes:sub(at + 1))
  raises("data", function() return moe.load_npz(folder .. "/z.npz") end, "checksum")
  raises("data", function() return moe.load_npz(folder .. "/x.npy") end)
  raises("usage", function() moe.save_npz(folder .. "/x.npz", { a = 3 }) end, "tensors.a")
end)

test("tensor: saves itself, and is equal to what was read", function()
  local t = moe.randn { 3, 4 }
  is(t:save(folder .. "/t.npy"):equal(t))
  is(moe.load_npy(folder .. "/t.npy"):equal(t))
  is(not t:equal(t + 1e-6) and not t:equal(t:double()) and not t:equal(t[0]))
  is(not moe.tensor { 0 / 0 }:equal(moe.tensor { 0 / 0 }))
  raises("usage", function() t:save "x.txt" end, ".npy")
  raises("dtype", function() t:bfloat16():save(folder .. "/b.npy") end, "tensor:save")
  raises("usage", function() return t:equal(3) end)
end)

test("safetensors: the dtypes that NumPy has not", function()
  moe.save_safetensors(folder .. "/x.safetensors", { a = moe.ones({ 2 }, { dtype = "bf16" }) })
  equal(moe.load_safetensors(folder .. "/x.safetensors").a.dtype, "bfloat16")
end)

check.done()

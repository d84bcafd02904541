-- Tensors' methods, the functions that make tensors and the kernels, called with arguments at random: each call gives a result or an error object, none ends the program.
-- `secs=60 seed=2` runs longer, from another start.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, is = check.test, check.is
math.randomseed(arg.options.seed or 1)

local called = {}
for name, f in pairs(moe.documented()["tensor"].__methods) do
  if name ~= "free" and name ~= "cuda" then called[#called + 1] = { name = name, f = f, method = true } end
end
for _, name in ipairs { "tensor", "zeros", "full", "arange", "linspace", "eye", "randint", "randperm", "where", "einsum", "cat", "stack", "grad", "gradcheck", "autograd", "generator", "full_like", "load_npy", "no_grad" } do
  called[#called + 1] = { name = "moe." .. name, f = moe[name], makes = true }
end
for name, f in pairs(moe.kernels) do
  if name ~= "make_cache_rows" and name ~= "normal_rows" and name ~= "dropout_mask" and name ~= "rope_table" then called[#called + 1] = { name = "moe.kernels." .. name, f = f } end
end

local plan = moe.kernels.sort_by_expert(moe.tensor { { 0, 1 }, { 1, 2 } }, 3)
local HUGE = 2 ^ 62
local values = {
  function() return math.random(-3, 4) end, function() return math.random(-3, 4) end, function() return math.random() * 4 - 2 end, function() return true end, function() return nil end,
  function() return ({ "1:3", "…", "cpu", "bf16", "", "ij->ji" })[math.random(6)] end, function() return { math.random(-2, 3), math.random(0, 3) } end, function() return {} end,
  function() return moe.randn { 2, 3 } end, function() return moe.arange(4) end, function() return moe.randn({ 3 }, { dtype = "bf16" }) end, function() return moe.zeros { 0, 2 } end,
  function() return moe.tensor { true, false } end, function() return moe.tensor(3.5) end, function() return moe.randn({ 2, 2, 2 }, { dtype = "fp64", requires_grad = true }) end,
  function() return HUGE end, function() return 0 / 0 end, function() return function() return moe.ones { 2 } end end, function() return { dtype = "fp16" } end, function() return plan end,
  function() return { keepdim = true } end, function() return moe.generator(1) end, function() return moe.randint(-2, 3, { 3, 2 }) end,
}
local function value() return values[math.random(#values)]() end

test("fuzz: random arguments give results or error objects", function()
  local stop, n, failed = moe.clock() + (arg.options.secs or 2), 0, 0
  while moe.clock() < stop do
    local c = called[math.random(#called)]
    local args = table.pack(value(), value(), value(), value(), value())
    if c.method and math.random() < 0.8 then repeat args[1] = value() until type(args[1]) == "userdata" end
    local fills_memory = false
    for i = 1, 5 do fills_memory = fills_memory or (args[i] == HUGE and c.makes) end
    if not fills_memory then
      local ok, err = pcall(c.f, table.unpack(args, 1, math.random(5)))
      n, failed = n + 1, failed + (ok and 0 or 1)
      is(ok or type(err) == "table" or c.name == "moe.gradcheck" or c.name == "moe.no_grad", c.name .. ": a bare error: " .. tostring(err))
    end
  end
  is(n > 200 and failed > n / 4 and failed < n, n .. " calls, " .. failed .. " failed")
end)

check.done()

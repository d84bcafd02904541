local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

test("help: every binding and every function of moe has a text", function()
  local texts, seen, missing = 0, {}, {}
  local function visit(value, name)
    if type(value) == "function" then
      texts = texts + 1
      local text = moe.help_text(value)
      if not text or #text < 12 or text:find("^a function") then missing[#missing + 1] = name end
    elseif type(value) == "table" and not seen[value] then
      seen[value] = true
      for key, inner in pairs(value) do
        if type(key) == "string" and not key:find("^__") then visit(inner, name .. "." .. key) end
      end
    end
  end
  -- Modules written in Lua load on first use.
  for _, module in ipairs { "plot", "table", "progress", "benchmarks", "json", "fs" } do local _ = moe[module] end
  visit(moe, "moe")
  for _, name in ipairs { "tensor", "sort plan", "config", "config section", "model", "trace", "run", "router", "intervention", "job", "layers", "layer", "part of a layer" } do
    local type_table = moe.documented()[name]
    is(type_table, "no help for the type " .. name)
    for _, list in ipairs { "__methods", "__fields" } do
      for key, f in pairs(type_table[list]) do visit(f, name .. ":" .. key) end
    end
  end
  equal(table.concat(missing, ", "), "")
  is(texts > 100, "only " .. texts .. " functions were seen")
end)

test("help: a function without a text is noticed", function()
  check.contains(moe.help_text(function() end), "function")
  is(moe.help_text(function() end):find("^a function"))
end)

test("help: functions, methods, types, modules and names", function()
  check.contains(moe.help_text(moe.zeros), "moe.zeros")
  check.contains(moe.help_text(moe.zeros { 1 }, "softmax"), "softmax")
  check.contains(moe.help_text("tensor:sum"), "sum")
  check.contains(moe.help_text("model.moe.num_experts"), "num_experts")
  check.contains(moe.help_text(moe), "moe.run")
  check.contains(moe.help_text(moe.zeros { 1 }), "matmul")
  check.contains(moe.help_text(viz), "viz.heatmap")
  raises("usage", function() return moe.help_text(moe.zeros { 1 }, "summ") end)
end)

check.done()

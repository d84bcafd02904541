-- All bindings that a session has, found by walking: functions of moe and its modules, methods, fields and operators of all types, and Lua's own functions that moe replaces.
-- What is added tomorrow is found as well.
local bindings = {}

-- What a test must not call, and why.
bindings.ENDS_PROGRAM = { ["moe.become"] = "replaces this program by another one", ["os.exit"] = "ends the program" }

-- Modules written in Lua load on first use.
local function load_modules()
  for _, module in ipairs(moe.modules()) do local _ = moe[module] end
  for _, kernel in pairs(moe.kernels) do local _ = type(kernel) == "table" and getmetatable(kernel) and kernel.reference end
end

local function is_type(value) return type(value) == "table" and rawget(value, "__methods") ~= nil end
local function is_callable(value)
  local meta = type(value) == "table" and getmetatable(value)
  return type(value) == "function" or (type(meta) == "table" and rawget(meta, "__call") ~= nil)
end

-- A list of {name, f, type (of the first argument, nil for none), field (true for what is read as x.name), help}, sorted by name; second a set of the types' names.
function bindings.all()
  load_modules()
  local list, types, seen, documented = {}, {}, {}, moe.documented()
  local function add(name, f, type_name, field)
    if seen[f] then return end
    seen[f] = true
    list[#list + 1] = { name = name, f = f, type = type_name, field = field, help = moe.help_text(f) }
  end
  for name, value in pairs(documented) do
    if is_type(value) then
      types[name] = true
      for _, part in ipairs { "__methods", "__fields" } do
        for key, f in pairs(rawget(value, part) or {}) do
          if type(f) == "function" then add(name .. (part == "__fields" and "." or ":") .. key, f, name, part == "__fields") end
        end
      end
      for key, f in pairs(value) do
        -- What Lua itself calls, with objects of the type alone, needs no guard where it is written in Lua.
        local unguarded = (key == "__index" or key == "__pairs") and type(f) == "function" and debug.getinfo(f, "S").what ~= "C"
        if type(key) == "string" and type(f) == "function" and not unguarded then add(name .. ":" .. key, f, name) end
      end
    end
  end
  local function visit(value, name)
    if is_callable(value) then add(name, value) end
    if type(value) ~= "table" or is_type(value) or seen["table " .. tostring(value)] then return end
    seen["table " .. tostring(value)] = true
    for key, inner in next, value do
      if type(key) == "string" and not key:find("^__") then visit(inner, name .. "." .. key) end
    end
  end
  visit(moe, "moe")
  -- Functions of C++ that are in no module: iterators, the session's own. (Those of Lua that no module gives are called by moe alone.)
  for name, value in pairs(documented) do
    if is_callable(value) and not is_type(value) and (type(value) ~= "function" or debug.getinfo(value, "S").what == "C") then
      local owner = name:match("^(.*):[^:]+$")
      add(name, value, owner and types[owner] and owner or nil)
    end
  end
  table.sort(list, function(a, b) return a.name < b.name end)
  return list, types
end

return bindings

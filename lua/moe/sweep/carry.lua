-- Functions as data: what a Lua function needs besides its code (upvalues, and functions that they call), so that another process can
-- call it, and as a text whose hash changes when the function would do something else.
local carry = {}

-- Everything that has the same name in every process: Lua's libraries, moe's functions and types, loaded modules.
local function shared_names()
  local names = {}
  for name, value in pairs(moe.documented()) do names[value] = { "documented", name } end
  for name, value in pairs(package.loaded) do
    if type(value) == "table" or type(value) == "function" then names[value] = { "module", name } end
  end
  for _, name in ipairs { "coroutine", "debug", "io", "math", "os", "package", "string", "table", "utf8" } do
    for key, value in pairs(_G[name]) do
      if type(value) == "function" or type(value) == "table" then names[value] = { "global", name, key } end
    end
  end
  for _, name in ipairs { "assert", "collectgarbage", "dofile", "error", "getmetatable", "ipairs", "load", "loadfile", "next", "pairs", "pcall", "print", "rawequal", "rawget", "rawlen", "rawset",
    "require", "select", "setmetatable", "tonumber", "tostring", "type", "xpcall", "help" } do
    if _G[name] then names[_G[name]] = { "global", name } end
  end
  names[_G] = { "globals" }
  names[moe] = { "module", "moe" }
  return names
end

local OWN = {}     -- globals that are not the user's
for _, name in ipairs { "_G", "_VERSION", "_", "moe", "viz", "help", "assert", "collectgarbage", "coroutine", "debug", "dofile", "error", "getmetatable", "io", "ipairs", "load", "loadfile", "math", "next", "os",
  "package", "pairs", "pcall", "print", "rawequal", "rawget", "rawlen", "rawset", "require", "select", "setmetatable", "string", "table", "tonumber", "tostring", "type", "utf8", "warn", "xpcall" } do OWN[name] = true end

-- A function's source without blank lines, comments of a whole line and indentation; nothing where its file is not there.
local texts = {}
local function source_of(f)
  local info = debug.getinfo(f, "S")
  local from, to = info.linedefined, info.lastlinedefined
  local text
  if info.source:sub(1, 1) == "@" then
    local path = info.source:sub(2)
    if texts[path] == nil then texts[path] = moe.fs.exists(path) and moe.fs.read(path) or false end
    text = texts[path]
  elseif info.source:sub(1, 1) ~= "=" then
    text = info.source
  end
  if not text or from < 1 then return nil end
  local out, n = {}, 0
  for line in (text .. "\n"):gmatch("(.-)\r?\n") do
    n = n + 1
    line = line:match("^%s*(.-)%s*$")
    if n >= from and n <= to and line ~= "" and not line:find("^%-%-") then out[#out + 1] = line end
  end
  return n >= to and table.concat(out, "\n") or nil
end

local function hex(text) return (text:gsub(".", function(c) return ("%02x"):format(c:byte()) end)) end
local function unhex(text) return (text:gsub("%x%x", function(h) return string.char(tonumber(h, 16)) end)) end

local function number_text(v) return math.type(v) == "integer" and ("%d"):format(v) or ("%a"):format(v) end

local Writer = {}
Writer.__index = Writer

-- Index of the value's node in the list; plain values and references to shared ones are nodes as well.
function Writer:add(value, path)
  local kind = type(value)
  if value == nil then return 0 end
  if self.seen[value] then return self.seen[value] end
  local node = {}
  self.nodes[#self.nodes + 1] = node
  local index = #self.nodes
  if kind ~= "number" then self.seen[value] = index end      -- 1 and 1.0 are one key of a table, and nan is none
  if kind == "string" then
    node.s = hex(value)
  elseif kind == "number" then
    node.n = number_text(value)
  elseif kind == "boolean" then
    node.b = value
  elseif value == moe.null then
    node.null = true
  elseif self.names[value] then
    node.name = self.names[value]
  elseif kind == "table" then
    self:add_table(node, value, path)
  elseif kind == "function" and debug.getinfo(value, "S").what ~= "C" then
    self:add_function(node, value, path)
  elseif kind == "userdata" and moe.help_text(value):find("^config:") then
    node.config = value:to_table()
  elseif self.lenient then
    node.kind = kind
  else
    moe.fail { op = "sweep: a function for another process: " .. path, got = "a " .. (kind == "function" and "function of C++" or kind), want = "numbers, texts, tables, configurations and Lua functions",
      hint = "make it inside fn, or run without jobs" }
  end
  return index
end

function Writer:add_table(node, value, path)
  node.t = {}
  for key, inner in pairs(value) do
    node.t[#node.t + 1] = { self:add(key, path .. ": a key"), self:add(inner, ("%s.%s"):format(path, tostring(key))) }
  end
  local meta = getmetatable(value)
  -- Those of moe's own tables (order of keys, lists) are not needed to read them.
  if type(meta) == "table" and not meta.__keys and meta.__name ~= "moe.list" then node.meta = self:add(meta, path .. ": its metatable") end
end

function Writer:add_function(node, f, path)
  node.f = self.lenient and source_of(f) or hex(string.dump(f, self.lenient))
  node.up = {}
  for i = 1, 255 do
    local name, value = debug.getupvalue(f, i)
    if not name then break end
    node.up[i] = self:add(value, ("%s: its upvalue '%s'"):format(path, name))
  end
  if not self.lenient then return end                       -- carry.pack takes all globals
  for _, name in ipairs(moe.globals_of(f)) do
    local value = not OWN[name] and rawget(_G, name)
    node.globals = node.globals or {}
    if value then node.globals[#node.globals + 1] = { name, self:add(value, ("%s: its global '%s'"):format(path, name)) } end
  end
end

local function writer(lenient) return setmetatable({ nodes = {}, seen = {}, names = shared_names(), lenient = lenient }, Writer) end

--- A text that is the same as long as the function does the same: its source and all that it holds on to.
function carry.text(f)
  local w = writer(true)
  w:add(f, "fn")
  return moe.json.encode(w.nodes)
end

--- What another process needs to call f: plain data for JSON. Globals that the user made come along where they can.
function carry.pack(f)
  local w = writer(false)
  local data = { root = w:add(f, "fn"), globals = {}, path = package.path }
  for name, value in pairs(_G) do
    if type(name) == "string" and not OWN[name] then
      local count = #w.nodes
      local ok, index = pcall(w.add, w, value, name)
      if ok then
        data.globals[#data.globals + 1] = { name, index }
      else                             -- half of it is no use
        for i = #w.nodes, count + 1, -1 do w.nodes[i] = nil end
        for seen, at in pairs(w.seen) do
          if at > count then w.seen[seen] = nil end
        end
      end
    end
  end
  data.nodes = w.nodes
  return data
end

local function named(name)
  if name[1] == "globals" then return _G end
  if name[1] == "module" then return require(name[2]) end
  if name[1] == "global" then
    local value = _G[name[2]]
    return name[3] and value[name[3]] or value
  end
  local value = moe.documented()[name[2]]
  if value == nil then                 -- of a module that is not loaded yet
    for _, module in ipairs(moe.modules()) do local _ = moe[module] end
    value = moe.documented()[name[2]]
  end
  return value
end

--- The function that pack took.
function carry.unpack(data)
  package.path = data.path
  local values = {}
  local function value(i)
    if i ~= 0 then return values[i] end
  end
  for i, node in ipairs(data.nodes) do
    if node.s then values[i] = unhex(node.s)
    elseif node.n then values[i] = tonumber(node.n)
    elseif node.b ~= nil then values[i] = node.b
    elseif node.null then values[i] = moe.null
    elseif node.name then values[i] = named(node.name)
    elseif node.config then values[i] = moe.config(node.config)
    elseif node.f then values[i] = assert(load(unhex(node.f), "fn", "b"))
    else values[i] = {} end
  end
  for i, node in ipairs(data.nodes) do
    for _, pair in ipairs(node.t or {}) do values[i][value(pair[1])] = value(pair[2]) end
    for k, index in ipairs(node.up or {}) do debug.setupvalue(values[i], k, value(index)) end
  end
  for i, node in ipairs(data.nodes) do
    if node.meta then setmetatable(values[i], value(node.meta)) end
  end
  for _, pair in ipairs(data.globals) do _G[pair[1]] = value(pair[2]) end
  return values[data.root]
end

return carry

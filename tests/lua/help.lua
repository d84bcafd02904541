local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises
local contains = check.contains

-- Modules written in Lua load on first use.
for _, module in ipairs(moe.modules()) do local _ = moe[module] end

-- Names of all functions that moe, its modules and its types have, with whether each has a text.
local function all_functions()
  local found, seen = {}, {}
  local function visit(value, name)
    if type(value) == "function" then
      found[name] = moe.help_text(value)
    elseif type(value) == "table" and not seen[value] then
      seen[value] = true
      for key, inner in pairs(value) do
        if type(key) == "string" and not key:find("^__") then visit(inner, name .. "." .. key) end
      end
    end
  end
  visit(moe, "moe")
  for name, value in pairs(moe.documented()) do
    if type(value) == "table" then
      for _, list in ipairs { "__methods", "__fields" } do
        for key, f in pairs(rawget(value, list) or {}) do visit(f, name .. ":" .. key) end
      end
    end
  end
  return found
end

test("help: every binding and every function of moe has a text", function()
  local texts, missing = 0, {}
  for name, text in pairs(all_functions()) do
    texts = texts + 1
    if not text or #text < 12 or text:find("^a function") then missing[#missing + 1] = name end
  end
  equal(table.concat(missing, ", "), "")
  is(texts > 200, "only " .. texts .. " functions were seen")
  for _, name in ipairs { "tensor", "generator", "operator", "cuda kernel", "cuda stream", "sort plan", "config", "config section", "model", "trace", "run", "router", "intervention", "callback", "job", "layers", "layer", "part of a layer", "data", "process", "table", "sweep", "progress" } do is(moe.documented()[name], "no help for the type " .. name) end
end)

test("help: every type's methods are seen, a hidden one would be missing", function()
  local Type = { __methods = { grow = function() end } }
  moe.document(Type, "test type", "test type: one whose method has no text.")
  contains(all_functions()["test type:grow"], "a function")
  moe.documented()["test type"].__methods = nil
end)

test("help: every example of a text runs by itself", function()
  local count, wrong = 0, {}
  for name, value in pairs(moe.documented()) do
    local text = moe.help_text(value)
    local at = type(value) == "table" and text:match("^[^\n]*\nExample: ([^\n]*)") or text:match("\nExample: ([^\n]*)$")
    if text:find("Example:", 1, true) and type(value) ~= "table" and not at then wrong[#wrong + 1] = name .. ": the example is not the last line" end
    if at then
      count = count + 1
      local printed = 0
      local env = setmetatable({ print = function(...) printed = printed + select("#", ...) end, help = function(...) printed = printed + #moe.help_text(...) end }, { __index = _G })
      local code, problem = load(at, at, "t", env)      -- named by its text: a hook keeps its source
      local start, ok, err = moe.clock(), false, problem
      if code then ok, err = pcall(code) end
      if not ok then wrong[#wrong + 1] = ("%s: %s"):format(name, tostring(err)) end
      if moe.clock() - start > 2 then wrong[#wrong + 1] = name .. ": takes seconds" end
    end
  end
  equal(table.concat(wrong, "\n"), "")
  is(count > 50, "only " .. count .. " examples")
end)

test("help: an example runs in a fresh session as it stands", function()
  for _, name in ipairs { "moe.table", "moe.sweep", "moe.json.decode", "config:with" } do
    local code = moe.help_text(name):match("\nExample: ([^\n]*)$")
    is(code, name .. " has no example")
    is(not code:find("'", 1, true) or name == "moe.json.decode")
    local out, exit = check.moelab(("-e '%s'"):format(code:gsub("'", "'\\''")))
    equal(exit, 0, code .. ": " .. out)
    is(#out > 0, code .. " prints nothing")
  end
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

test("help: words that name nothing are searched for in names, then in texts, with the line that has them", function()
  local text = moe.help_text "capacity"
  local names, texts = text:find("Names with capacity\n", 1, true), text:find("Texts with capacity\n", 1, true)
  is(names == 1 and texts and names < texts, text)
  contains(text, "\n  model.moe.capacity_factor: ")
  contains(text:sub(texts), "\n  trace:dropped: ")
  for line in text:gmatch("[^\n]+") do is(#line < 200, line) end
  contains(moe.help_text "Learning RATE", "training.learning_rate")
  contains(moe.help_text "heat map", "\n  viz.heatmap: ")
  contains(moe.help_text "tensor", "tensor: ")      -- a name of its own
  is(not moe.help_text("tensor"):find "^Names with")
  contains(moe.help_text "a", " more")
  raises("usage", function() return moe.help_text "moe.zerros" end, 'did you mean "moe.zeros"?')
  raises("usage", function() return moe.help_text " " end)
end)

test("help: a misspelt name of a module is an error that names the nearest; pairs, help and keys that are no texts go on", function()
  local MISSPELT = { ["moe.kernels"] = { "rmsnrm", "rmsnorm" }, viz = { "lines", "line" }, ["moe.balance"] = { "auxx", "aux" }, ["moe.fs"] = { "writ", "write" }, ["moe.json"] = { "encod", "encode" },
    ["moe.statistics"] = { "meen", "mean" }, ["moe.cuda"] = { "compil", "compile" }, ["moe.draw"] = { "pngg", "png" } }
  for name, names in pairs(MISSPELT) do
    local module = moe.documented()[name]
    raises("usage", function() return module[names[1]] end, ("%s.%s"):format(name, names[1]), ('did you mean "%s"?'):format(names[2]), ("help(%s)"):format(name))
    raises("usage", function() return moe.help_text(module, names[1]) end, ('did you mean "%s"?'):format(names[2]))
    is(module[1] == nil and rawget(module, names[1]) == nil)
    contains(moe.help_text(module), names[2])
    local found = {}
    for key in pairs(module) do found[key] = true end
    is(found[names[2]] and not found.__index)
  end
  -- Every table of functions that moe has is such a one.
  for key, value in pairs(moe) do
    if type(value) == "table" and not (getmetatable(value) or {}).__call then raises("usage", function() return value.no_such_name end, "no_such_name") end
  end
end)

test("help: what is loaded on first use is listed before it, too, and nil is explained", function()
  local out, code = check.moelab "-e 'print(moe.help_text(moe)) print(moe.help_text(nil))'"
  equal(code, 0, out)
  for _, part in ipairs { "\n  moe.sweep {", "\n  moe.data", "\n  moe.run {", "nil: nothing has this name" } do contains(out, part) end
end)

test("help: objects of types written in Lua list their methods", function()
  local t = moe.table { { a = 1 } }
  contains(moe.help_text(t), "t:sort")
  contains(moe.help_text(t, "sort"), "descending")
  contains(moe.help_text "sweep:run", "jobs")
end)

test("docs: one page of Markdown or HTML with every function, command and key", function()
  local folder = check.folder()
  local out, code = check.moelab("docs -o '" .. folder .. "/reference.html' --json")
  equal(code, 0, out)
  local made = moe.json.decode(out)
  local html, n = moe.fs.read(made.file), 0
  local md = check.moelab "docs"
  for name in pairs(all_functions()) do
    is(html:find(name:match("[^.:]+$"), 1, true), name .. " is not in the page")
    n = n + 1
  end
  for name, value in pairs(moe.documented()) do                 -- each has its own entry, kernels too, which are tables that are called
    if name:find("^moe%.") and not name:find("[:.]__") and (type(value) == "function" or (getmetatable(value) or {}).__call) then is(html:find(('id="f-%s"'):format((name:gsub("[^%w]+", "-"))), 1, true), name .. " has no entry") end
  end
  is(made.entries > 200, made.entries .. " entries")
  for _, part in ipairs { "## Contents", "### moe.run", "### tensor:sum", "`moe.sweep {name =", "\nweights [T, K] and ids int64 [T, K] of the chosen experts", "```lua", "\n| model.moe.num_experts [", "moelab sweep FILE.lua" } do is(md:find(part, 1, true), part .. " is not in the Markdown") end
  for _, part in ipairs { '<h3 id="f-moe-run">', '<a href="#f-tensor-sum">', '<tr id="k-model-moe-num-experts">', "moelab sweep FILE.lua" } do is(html:find(part, 1, true), part .. " is not in the page") end
  -- Every link leads somewhere, and tags are balanced.
  for _, page in ipairs { { html, 'href="#([^"]*)"' }, { md, "%]%(#([^)]*)%)" } } do
    for id in page[1]:gmatch(page[2]) do is(page[1]:find(('id="%s"'):format(id), 1, true), "no place for the link " .. id) end
  end
  for _, tag in ipairs { "table", "tr", "td", "code", "pre", "ul", "li", "details", "p", "main" } do
    local opened, closed = select(2, html:gsub("<" .. tag .. "[ >]", "")), select(2, html:gsub("</" .. tag .. ">", ""))
    equal(opened, closed, tag)
  end
  equal(select(2, check.moelab "docs --html --markdown"), 2)
  equal(select(2, check.moelab "docs x"), 2)
  out, code = check.moelab("docs -o /proc/none/x.md")
  equal(code, 1)
  contains(out, "/proc/none")
end)

check.done()

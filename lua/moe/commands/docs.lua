-- moelab docs [--html|--markdown] [-o FILE]: writes the reference of functions, commands and keys as one page.

-- --- what there is to say: a list of {title, about, entries = {{name, signature, text, example}}} ---

local function load_modules()
  for _, name in ipairs(moe.modules()) do local _ = moe[name] end
  require "moe.sweep.train"                -- a function that scripts may call, in a module of its own
end

-- "moe.run {config =}: makes a run.\nExample: …" in its parts. The signature ends at the first ": " outside of brackets and quotes.
local function parts_of(name, text)
  local body, example = text:match("^(.-)\n+Example: ([^\n]*)%s*$")
  if not body then body, example = text:match("^(.-)\n([^\n]*moe%.kernels%.[^\n]*)$") end      -- those of kernels end with one
  body = body or text
  local depth, quoted, cut = 0, false, nil
  for i = 1, #body do
    local c = body:sub(i, i)
    if c == '"' then quoted = not quoted
    elseif not quoted and c:find("[%(%[{]") then depth = depth + 1
    elseif not quoted and c:find("[%)%]}]") then depth = depth - 1
    elseif not quoted and depth <= 0 and body:sub(i, i + 1) == ": " then
      cut = i
      break
    elseif c == "\n" then break end
  end
  local signature = cut and body:sub(1, cut - 1) or name
  return { name = name, signature = signature, text = cut and body:sub(cut + 2) or body, example = example }
end

-- A table that is called like a function, as kernels are: fields beside it (.reference) have entries of their own.
local function is_callable(value) return type(value) == "function" or type(value) == "table" and (getmetatable(value) or {}).__call ~= nil end
local function is_type(value) return type(value) == "table" and rawget(value, "__methods") ~= nil end

-- Section of a name: its module ("moe.fs" of "moe.fs.list"), its type ("tensor" of "tensor:sum"), or Lua itself.
local function owner_of(name, documented)
  local owner = name:match("^(.*)[:.][^:.]+$")
  if not owner then return "Lua" end
  while owner and (documented[owner] == nil or is_callable(documented[owner])) and not owner:find("^moe$") do
    local above = owner:match("^(.*)[:.][^:.]+$")
    if not above then break end
    owner = above
  end
  return owner
end

local function reference()
  load_modules()
  local documented, sections, order = moe.documented(), {}, {}
  local function section(name)
    if not sections[name] then
      local value = documented[name]
      sections[name] = { title = name, about = value and moe.help_text(name):match("^[^\n]*") or nil, entries = {}, is_type = is_type(value) }
      order[#order + 1] = name
    end
    return sections[name]
  end
  for name, value in pairs(documented) do
    if not is_callable(value) then
      section(name)
    elseif not name:find("[:.]__") then
      local owner = section(owner_of(name, documented))
      owner.entries[#owner.entries + 1] = parts_of(name, moe.help_text(value))
    end
  end
  local function place(name) return name == "moe" and 0 or sections[name].is_type and 2 or name == "Lua" and 3 or 1 end
  table.sort(order, function(a, b)
    if place(a) ~= place(b) then return place(a) < place(b) end
    return a < b
  end)
  local list = {}
  for _, name in ipairs(order) do
    local s = sections[name]
    table.sort(s.entries, function(a, b) return a.name < b.name end)
    if name == "Lua" or not s.about then s.about = s.about or "Lua's own functions that differ here." end
    if #s.entries > 0 then list[#list + 1] = s end
  end
  return list
end

local function commands()
  local rows = {}
  for _, c in ipairs(moe.commands()) do rows[#rows + 1] = { c.usage, c.about } end
  rows[#rows + 1] = { "moelab run [--ranks N] FILE.lua [key=value …]", "runs an experiment; key=value reaches it as arg.options." }
  rows[#rows + 1] = { "moelab -e CODE", "runs one piece of Lua and prints its values." }
  table.sort(rows, function(a, b) return a[1] < b[1] end)
  return rows
end

-- Rows {key, default, meaning} of moe.config_keys()'s Markdown.
local function keys()
  local rows = {}
  for line in moe.config_keys():gmatch("[^\n]+") do
    local cells = {}
    for cell in line:gsub("\\|", "\1"):gmatch("|%s*([^|]*)") do cells[#cells + 1] = (cell:gsub("%s+$", ""):gsub("\1", "|")) end
    if #rows > 0 or cells[1] ~= "key" then
      if cells[1] and not cells[1]:find("^%-%-%-") then rows[#rows + 1] = { cells[1], (cells[2]:gsub("^`(.*)`$", "%1")), cells[3] } end
    end
  end
  return rows
end

local INTRO = "A sandbox for mixture-of-experts language models, driven by Lua. moe, viz (= moe.plot) and help are there in scripts, in moelab -e and in the prompt; help(x) prints what stands here. "
  .. "Layers, experts and elements of tensors count from 0, plain Lua tables from 1. Options are named keys of a table; an unknown one is an error that names the nearest."

-- Ids are made of a letter for what it is, since "run" is a type and moe.run a function.
local function id_of(kind, name) return kind .. "-" .. name:gsub("[^%w]+", "-") end

-- --- Markdown ---

local function md(text) return (text:gsub("[<>]", { ["<"] = "&lt;", [">"] = "&gt;" })) end
local function md_cell(text) return (md(text):gsub("|", "\\|")) end

local function markdown(sections)
  local out = { "# moelab " .. moe.version .. ": reference", INTRO, "", "## Contents" }
  local function add(text) out[#out + 1] = text end
  for _, s in ipairs(sections) do
    local names = {}
    for i, e in ipairs(s.entries) do names[i] = ("[%s](#%s)"):format(e.name:match("[^.:]+$"):gsub("_", "\\_"), id_of("f", e.name)) end
    add(("- [%s](#%s): %s"):format(s.title, id_of("s", s.title), table.concat(names, ", ")))
  end
  add("- [Commands](#commands)\n- [Configuration keys](#keys)")
  for _, s in ipairs(sections) do
    add(('\n<a id="%s"></a>\n## %s\n%s'):format(id_of("s", s.title), s.title, md(s.about)))
    for _, e in ipairs(s.entries) do
      add(('\n<a id="%s"></a>\n### %s\n`%s`  \n%s'):format(id_of("f", e.name), e.name, e.signature, md(e.text)))
      if e.example then add("```lua\n" .. e.example .. "\n```") end
    end
  end
  add('\n<a id="commands"></a>\n## Commands\nEvery command has --help; --json works everywhere.\n\n| command | what it does |\n| --- | --- |')
  for _, c in ipairs(commands()) do add(("| `%s` | %s |"):format(c[1]:gsub("|", "\\|"), md_cell(c[2]))) end
  add('\n<a id="keys"></a>\n## Configuration keys\n| key | default | meaning |\n| --- | --- | --- |')
  for _, k in ipairs(keys()) do add(("| %s | %s | %s |"):format(k[1], k[2] ~= "" and "`" .. k[2]:gsub("|", "\\|") .. "`" or "", md_cell(k[3]))) end
  return table.concat(out, "\n") .. "\n"
end

-- --- HTML ---

local STYLE = [[
:root{--ink:#1f2933;--soft:#5b6775;--line:#e4e8ee;--code:#f4f6f9;--link:#1f6fb4;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#dfe5ec;--soft:#9aa7b5;--line:#2c3540;--code:#1b232c;--link:#6db3f2;--page:#12181f}}
*{box-sizing:border-box}body{margin:0;font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);display:grid;grid-template-columns:17rem minmax(0,1fr)}
nav{position:sticky;top:0;height:100vh;overflow:auto;padding:1rem;border-right:1px solid var(--line);font-size:13px}
main{padding:1rem 2rem 4rem;max-width:62rem}a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
nav summary{cursor:pointer;font-weight:600}nav ul{margin:.2rem 0 .6rem;padding-left:1.1rem;list-style:none}
h2{margin-top:3rem;border-bottom:1px solid var(--line)}h3{margin:1.6rem 0 .2rem;font-size:1rem}
code,pre{font:13px/1.5 ui-monospace,monospace;background:var(--code);border-radius:4px}code{padding:.1em .3em}pre{padding:.6rem .8rem;overflow:auto}
p{margin:.3rem 0;white-space:pre-line}table{border-collapse:collapse;width:100%;font-size:14px}td,th{border-bottom:1px solid var(--line);padding:.3rem .5rem;text-align:left;vertical-align:top}td:first-child,td code{overflow-wrap:anywhere}
@media(max-width:50rem){body{display:block}nav{position:static;height:auto}}]]

local function esc(text) return (text:gsub('[&<>"]', { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" })) end
local function esc_code(text) return (esc(text):gsub("`([^`]+)`", "<code>%1</code>")) end

local function html(sections)
  local out = {}
  local function add(text) out[#out + 1] = text end
  add(('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">\n<title>moelab %s: reference</title>\n<style>%s</style></head><body>\n<nav><b>moelab %s</b>'):format(
    esc(moe.version), STYLE, esc(moe.version)))
  for _, s in ipairs(sections) do
    add(('<details><summary><a href="#%s">%s</a></summary><ul>'):format(id_of("s", s.title), esc(s.title)))
    for _, e in ipairs(s.entries) do add(('<li><a href="#%s">%s</a></li>'):format(id_of("f", e.name), esc(e.name))) end
    add("</ul></details>")
  end
  add('<p><a href="#commands">Commands</a></p><p><a href="#keys">Configuration keys</a></p></nav>\n<main><h1>Reference</h1>\n<p>' .. esc(INTRO) .. "</p>")
  for _, s in ipairs(sections) do
    add(('<h2 id="%s">%s</h2>\n<p>%s</p>'):format(id_of("s", s.title), esc(s.title), esc(s.about)))
    for _, e in ipairs(s.entries) do
      add(('<h3 id="%s">%s</h3>\n<p><code>%s</code></p>\n<p>%s</p>'):format(id_of("f", e.name), esc(e.name), esc(e.signature), esc_code(e.text)))
      if e.example then add("<pre>" .. esc(e.example) .. "</pre>") end
    end
  end
  add('<h2 id="commands">Commands</h2>\n<p>Every command has --help; --json works everywhere.</p>\n<table><tr><th>command</th><th>what it does</th></tr>')
  for _, c in ipairs(commands()) do add(("<tr><td><code>%s</code></td><td>%s</td></tr>"):format(esc(c[1]), esc_code(c[2]))) end
  add('</table>\n<h2 id="keys">Configuration keys</h2>\n<table><tr><th>key</th><th>default</th><th>meaning</th></tr>')
  for _, k in ipairs(keys()) do add(('<tr id="%s"><td>%s</td><td>%s</td><td>%s</td></tr>'):format(id_of("k", k[1]:match("%S+")), esc(k[1]), k[2] ~= "" and "<code>" .. esc(k[2]) .. "</code>" or "", esc_code(k[3]))) end
  add("</table></main></body></html>")
  return table.concat(out, "\n") .. "\n"
end

return function(words, options, given)
  if words[1] then moe.fail { op = "moelab docs", got = words[1], want = "no words", hint = "-o FILE says where to write" } end
  moe.check_keys(options, {}, "docs: options")
  local path = given.output
  local wants_html = given.html or (not given.markdown and path and path:find("%.html?$"))
  local sections = reference()
  local text = wants_html and html(sections) or markdown(sections)
  if not path then
    moe.write(text)
    return
  end
  moe.fs.write(path, text)
  local entries = 0
  for _, s in ipairs(sections) do entries = entries + #s.entries end
  if given.json then
    print(moe.json.encode { file = path, sections = #sections, entries = entries, bytes = #text })
  else
    print(("%s: %d entries in %d sections, %s"):format(path, entries, #sections, moe.format_bytes(#text)))
  end
end

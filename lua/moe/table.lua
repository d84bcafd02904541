-- moe.table(rows, options): rows of named columns: printed in aligned columns, sorted, filtered, grouped, saved.
local csv = require "moe.table.csv"
local Table = { __name = "table" }

local function width_of(text) return utf8.len(text) or #text end

local function cell_text(value, format)
  if value == nil or value == moe.null then return "" end
  if value ~= value then return "nan" end
  if format and type(value) == "number" then return format:format(value) end
  if math.type(value) == "float" then return ("%.4g"):format(value) end
  return tostring(value)
end

local function columns_of(rows)
  local first, list, seen = rows[1] or {}, {}, {}
  if #first > 0 then
    for i = 1, #first do list[i] = i end
    return list
  end
  for _, row in ipairs(rows) do
    for key in pairs(row) do
      if not seen[key] then list[#list + 1], seen[key] = key, true end
    end
  end
  return list
end

-- Texts of the head and of all cells; which columns hold only numbers.
local function cells_of(t)
  local formats, titles = t.options.formats or {}, t.options.titles or {}
  local head, lines, numeric, named = {}, {}, {}, false
  for c, key in ipairs(t.columns) do
    head[c] = tostring(titles[c] or titles[key] or (type(key) == "string" and key or ""))
    numeric[c], named = #t.rows > 0, named or head[c] ~= ""
  end
  for r, row in ipairs(t.rows) do
    lines[r] = {}
    for c, key in ipairs(t.columns) do
      lines[r][c] = cell_text(row[key], formats[key] or formats[c])
      numeric[c] = numeric[c] and (row[key] == nil or type(row[key]) == "number")
    end
  end
  return head, lines, numeric, named
end

local function text_of(t)
  local head, lines, numeric, named = cells_of(t)
  local widths = {}
  for c in ipairs(t.columns) do
    widths[c] = width_of(head[c])
    for _, cells in ipairs(lines) do widths[c] = math.max(widths[c], width_of(cells[c])) end
  end
  local function join(cells)
    local out = {}
    for c, text in ipairs(cells) do
      local pad = (" "):rep(widths[c] - width_of(text))
      out[c] = numeric[c] and pad .. text or text .. pad
    end
    return (table.concat(out, "  "):gsub("%s+$", ""))
  end
  local out = { t.options.title }
  if named then
    local rule = {}
    for c in ipairs(t.columns) do rule[c] = ("-"):rep(widths[c]) end
    out[#out + 1] = join(head)
    out[#out + 1] = table.concat(rule, "  ")
  end
  for _, cells in ipairs(lines) do out[#out + 1] = join(cells) end
  return table.concat(out, "\n")
end

local function make(rows, options)
  if type(rows) ~= "table" then moe.fail { op = "moe.table: rows", got = type(rows), want = "a list of rows" } end
  options = moe.check_keys(options or {}, { "columns", "titles", "formats", "title" }, "moe.table: options")
  if getmetatable(rows) == Table then rows = rows.rows end
  for i, row in ipairs(rows) do
    if type(row) ~= "table" then moe.fail { op = ("moe.table: row %d"):format(i), got = type(row), want = "a table" } end
  end
  return setmetatable({ rows = rows, columns = options.columns or columns_of(rows), options = options }, Table)
end

local function with_rows(t, rows, columns)
  local o = t.options
  return make(rows, { columns = columns or t.columns, titles = o.titles, formats = o.formats, title = o.title })
end

-- --- methods ---
local methods = {}

local function check_column(t, name, op)
  for _, key in ipairs(t.columns) do
    if key == name then return name end
  end
  local known = {}
  for i, key in ipairs(t.columns) do known[i] = tostring(key) end
  moe.check_keys({ [tostring(name)] = true }, known, op .. ": column")
  moe.fail { op = op .. ": column", got = tostring(name), want = "one of " .. table.concat(known, ", ") }
end

local function check_columns(t, names, op)
  if type(names) ~= "table" then names = { names } end
  for _, name in ipairs(names) do check_column(t, name, op) end
  return names
end

function methods.column(t, name)
  check_column(t, name, "table:column")
  local list = {}
  for i, row in ipairs(t.rows) do list[i] = row[name] == nil and moe.null or row[name] end
  return list
end

function methods.select(t, names) return with_rows(t, t.rows, check_columns(t, names, "table:select")) end

function methods.filter(t, wanted)
  local keep = wanted
  if type(wanted) == "table" then
    for key in pairs(wanted) do check_column(t, key, "table:filter") end
    keep = function(row)
      for key, value in pairs(wanted) do
        if row[key] ~= value then return false end
      end
      return true
    end
  elseif type(wanted) ~= "function" then
    moe.fail { op = "table:filter", got = type(wanted), want = "a function of a row, or a table of values by column" }
  end
  local rows = {}
  for _, row in ipairs(t.rows) do
    if keep(row) then rows[#rows + 1] = row end
  end
  return with_rows(t, rows)
end

-- An order of all values: numbers (nan last), then texts, then the rest by their text, then what is missing.
local function rank_of(v)
  if v == nil or v == moe.null then return 4 end
  if type(v) == "number" then return v == v and 1 or 3 end
  return 2
end
local function compare(a, b)
  local ra, rb = rank_of(a), rank_of(b)
  if ra ~= rb then return ra < rb and -1 or 1 end
  if ra > 2 then return 0 end
  if ra == 2 then a, b = tostring(a), tostring(b) end
  return a < b and -1 or a > b and 1 or 0
end

function methods.sort(t, names, options)
  names = check_columns(t, names, "table:sort")
  options = moe.check_keys(options or {}, { "descending" }, "table:sort: options")
  local order = {}
  for i = 1, #t.rows do order[i] = i end
  table.sort(order, function(i, k)
    for _, name in ipairs(names) do
      local a, b = t.rows[i][name], t.rows[k][name]
      local c = compare(a, b)
      if options.descending and rank_of(a) < 3 and rank_of(b) < 3 then c = -c end
      if c ~= 0 then return c < 0 end
    end
    return i < k                       -- rows that are equal keep their order
  end)
  local rows = {}
  for i, k in ipairs(order) do rows[i] = t.rows[k] end
  return with_rows(t, rows)
end

function methods.with(t, name, f)
  if type(f) ~= "function" then moe.fail { op = "table:with", got = type(f), want = "a function of a row" } end
  local rows, columns, there = {}, {}, false
  for i, key in ipairs(t.columns) do columns[i], there = key, there or key == name end
  if not there then columns[#columns + 1] = name end
  for i, row in ipairs(t.rows) do
    rows[i] = {}
    for key, value in pairs(row) do rows[i][key] = value end
    rows[i][name] = f(row)
  end
  return with_rows(t, rows, columns)
end

function methods.markdown(t)
  local head, lines, numeric = cells_of(t)
  local function join(cells)
    local out = {}
    for i, text in ipairs(cells) do out[i] = text:gsub("|", "\\|"):gsub("\n", " ") end
    return "| " .. table.concat(out, " | ") .. " |"
  end
  local rule = {}
  for c in ipairs(t.columns) do rule[c] = numeric[c] and "---:" or "---" end
  local out = { join(head), "| " .. table.concat(rule, " | ") .. " |" }
  for _, cells in ipairs(lines) do out[#out + 1] = join(cells) end
  return table.concat(out, "\n") .. "\n"
end

function methods.csv(t)
  local head, rows = {}, {}
  for c, key in ipairs(t.columns) do head[c] = tostring(key) end
  for r, row in ipairs(t.rows) do
    rows[r] = {}
    for c, key in ipairs(t.columns) do rows[r][c] = row[key] end
  end
  return csv(head, rows)
end

function methods.to_table(t)
  local rows = {}
  for i, row in ipairs(t.rows) do
    rows[i] = {}
    for _, key in ipairs(t.columns) do rows[i][key] = row[key] end
  end
  return rows
end

local WRITERS = {
  csv = methods.csv, md = methods.markdown,
  json = function(t) return moe.json.encode(t:to_table(), { indent = 1 }) .. "\n" end,
  txt = function(t) return text_of(t) .. "\n" end,
}

function methods.save(t, path)
  local suffix = tostring(path):match("%.(%w+)$")
  local writer = WRITERS[suffix]
  if not writer then moe.fail { op = "table:save", got = tostring(path), want = "a path that ends in .csv, .json, .md or .txt" } end
  moe.fs.write(path, writer(t))
  return t
end

-- --- groups ---
local Groups = { __name = "groups" }
Groups.__index = Groups
Groups.__len = function(g) return #g.list end
Groups.__tostring = function(g) return ("groups: %d by %s; :agg { … } makes one row of each"):format(#g.list, table.concat(g.keys, ", ")) end

function methods.group(t, names)
  names = check_columns(t, names, "table:group")
  local list, by_key = {}, {}
  for _, row in ipairs(t.rows) do
    local parts = {}
    for i, name in ipairs(names) do
      local v = row[name]
      parts[i] = type(v) .. ":" .. (type(v) == "table" and moe.json.encode(v) or tostring(v))
    end
    local key = table.concat(parts, "\0")
    if not by_key[key] then
      by_key[key] = { first = row, rows = {} }
      list[#list + 1] = by_key[key]
    end
    table.insert(by_key[key].rows, row)
  end
  for i, group in ipairs(list) do list[i] = { first = group.first, table = with_rows(t, group.rows) } end
  return setmetatable({ of = t, keys = names, list = list }, Groups)
end

function methods.agg(t, metrics) return setmetatable({ of = t, keys = {}, list = { { first = t.rows[1] or {}, table = t } } }, Groups):agg(metrics) end

function Groups:each()
  if getmetatable(self) ~= Groups then moe.fail { op = "groups:each", got = type(self), want = "groups, from table:group" } end
  local i = 0
  return function()
    i = i + 1
    if self.list[i] then return self.list[i].first, self.list[i].table end
  end
end

-- Columns of numbers that are no keys.
local function numeric_columns(g)
  local is_key, list = {}, {}
  for _, key in ipairs(g.keys) do is_key[key] = true end
  for _, column in ipairs(g.of.columns) do
    local numbers, others = 0, 0
    for _, row in ipairs(g.of.rows) do
      local v = row[column]
      if type(v) == "number" then numbers = numbers + 1 elseif v ~= nil and v ~= moe.null then others = others + 1 end
    end
    if numbers > 0 and others == 0 and not is_key[column] then list[#list + 1] = column end
  end
  return list
end

local function values_of(t, column)
  local list = {}
  for _, row in ipairs(t.rows) do
    if type(row[column]) == "number" then list[#list + 1] = row[column] end
  end
  return list
end

local finite = moe.statistics.finite
local function of_finite(f)
  return function(values) return f(finite(values)) end
end

-- nan wins, wherever it stands.
local function extreme(values, better)
  local best = values[1]
  for _, v in ipairs(values) do
    if v ~= v then return v end
    if better(v, best) then best = v end
  end
  return best
end

local function sum(values)
  local total = 0
  for _, v in ipairs(values) do total = total + v end
  return total
end

local ONE = {
  mean = moe.statistics.mean, median = moe.statistics.median, sum = sum,
  std = function(v) return #v > 1 and moe.statistics.std(v) or nil end,
  ci = function(v) return #v > 1 and select(2, moe.statistics.interval(v)) or nil end,
  min = function(v) return extreme(v, function(a, b) return a < b end) end,
  max = function(v) return extreme(v, function(a, b) return a > b end) end,
  n = function(v) return #v end, first = function(v) return v[1] end,
}

local function finite_mean(values)
  values = finite(values)
  return #values > 0 and ONE.mean(values) or 0 / 0
end

--- What agg is asked for: a list of {column of the result, column of the rows, function of its values}, and the first listed column, if one is.
local function aggregates(g, metrics)
  local listed = metrics ~= nil
  if not listed then metrics = numeric_columns(g) end
  if type(metrics) ~= "table" then metrics = { metrics } end
  local list = {}
  for i, column in ipairs(metrics) do
    check_column(g.of, column, "groups:agg")
    list[#list + 1] = { column, column, finite_mean }
    list[#list + 1] = { column .. "_std", column, of_finite(ONE.std) }
    list[#list + 1] = { column .. "_ci", column, of_finite(ONE.ci) }
    list[#list + 1] = { column .. "_n", column, of_finite(ONE.n), is_count = true }
  end
  for name, what in pairs(metrics) do
    if type(name) == "string" then
      if type(what) ~= "table" or (type(what[2]) ~= "string" and type(what[2]) ~= "function") then
        moe.fail { op = "groups:agg: " .. name, got = type(what), want = '{"column", "mean" or a function of a list of numbers}' }
      end
      check_column(g.of, what[1], "groups:agg: " .. name)
      local known = {}
      for key in pairs(ONE) do known[#known + 1] = key end
      if type(what[2]) == "string" then moe.check_keys({ [what[2]] = true }, known, "groups:agg: " .. name) end
      list[#list + 1] = { name, what[1], type(what[2]) == "function" and what[2] or ONE[what[2]] }
    end
  end
  return list, listed and metrics[1] or nil
end

function Groups:agg(metrics)
  local list, main = aggregates(self, metrics)
  local columns, rows = {}, {}
  for i, key in ipairs(self.keys) do columns[i] = key end
  columns[#columns + 1] = "n"
  local differs = {}
  for r, group in ipairs(self.list) do
    local n = main and #finite(values_of(group.table, main)) or #group.table.rows
    local row = { n = n }
    for _, key in ipairs(self.keys) do row[key] = group.first[key] end
    for _, a in ipairs(list) do
      local values = values_of(group.table, a[2])
      if #values > 0 or a.is_count then row[a[1]] = a[3](values) end
      if a.is_count then differs[a[1]] = differs[a[1]] or row[a[1]] ~= n end
    end
    rows[r] = row
  end
  for _, a in ipairs(list) do
    if not a.is_count or differs[a[1]] then columns[#columns + 1] = a[1] end
  end
  return with_rows(self.of, rows, columns)
end

-- --- the type ---

Table.__tostring = text_of
Table.__len = function(t) return #t.rows end
Table.__pairs = function(t) return ipairs(t.rows) end
Table.__index = function(t, key)
  if math.type(key) == "integer" then return t.rows[key] end
  if key == "text" then return text_of(t) end
  if methods[key] then return methods[key] end
  local known = { "rows", "columns", "text" }
  for name in pairs(methods) do known[#known + 1] = name end
  if type(key) == "string" then moe.check_keys({ [key] = true }, known, "table: method or field") end
end

local TEXTS = {
  column = "t:column(name): the values of a column as a list, moe.null where a row has none.\nExample: print(#moe.table { { a = 1 }, { a = 2 } }:column \"a\")",
  select = "t:select {columns}: a table of these columns, in this order.\nExample: print(moe.table { { a = 1, b = 2 } }:select { \"b\" })",
  filter = "t:filter(f), t:filter {column = value, …}: the rows for which f(row) is true, or which have these values.\nExample: print(moe.table { { a = 1 }, { a = 2 } }:filter(function(row) return row.a > 1 end))",
  sort = "t:sort(column or {columns}, {descending = false}): sorted rows: numbers, then texts; nan and what is missing last; equal rows keep their order.\nExample: print(moe.table { { a = 2 }, { a = 1 } }:sort \"a\")",
  with = "t:with(name, f): a further column, f(row) of each row.\nExample: print(moe.table { { a = 2 } }:with(\"square\", function(row) return row.a ^ 2 end))",
  group = "t:group {columns}: the rows with equal values there as one group each, in order of appearance; :agg { … } makes a row of each.\nExample: print(moe.table { { lr = 1, loss = 2.0 }, { lr = 1, loss = 2.4 } }:group { \"lr\" }:agg { \"loss\" })",
  agg = "t:agg {columns}: all rows as one group; see groups:agg.\nExample: print(moe.table { { loss = 2.0 }, { loss = 2.4 } }:agg { \"loss\" })",
  markdown = "t:markdown(): the table as Markdown.\nExample: print(moe.table({ { a = 1 } }):markdown())",
  csv = "t:csv(): the table as comma-separated values, all digits kept (RFC 4180).\nExample: print(moe.table({ { a = 1 } }):csv())",
  to_table = "t:to_table(): its rows as plain tables.\nExample: print(moe.table({ { a = 1 } }):to_table()[1].a)",
  save = "t:save(path): writes .csv, .json, .md or .txt. Returns t.",
}
for name, text in pairs(TEXTS) do moe.document(methods[name], "table:" .. name, text) end
moe.document(Groups.agg, "groups:agg",
  "g:agg {\"loss\", worst = {\"loss\", \"max\"}}: a row for each group: its keys, n (finite numbers in the first listed column; rows where none is listed), of each listed column's finite numbers mean (nan of none), NAME_std (n − 1), NAME_ci (half the 95 % confidence interval, Student's t) and, where it differs from n, their number NAME_n; and by name one of mean, std, ci, median, min, max, sum, n, first or a function of the list of numbers. Without arguments: all columns of numbers.\n"
  .. "Example: print(moe.table { { k = 1, x = 2 }, { k = 1, x = 4 } }:group \"k\":agg { \"x\", worst = { \"x\", \"max\" } })")
moe.document(Groups.each, "groups:each", "for first, rows in g:each() do … end: the first row of each group, and a table of all of its rows.")
Groups.__methods = { agg = Groups.agg, each = Groups.each }
moe.document(Groups, "groups", "groups: rows of a table with equal keys, as t:group gives them.")
Table.__methods = methods
moe.document(Table, "table", "table: rows of named columns. t[i] is a row, #t their number, t.columns the columns; print shows it.")

return moe.document(make, "moe.table",
  'moe.table(rows, {columns = {"name", "loss"}, titles = {…}, formats = {loss = "%.3f"}, title =}): rows (lists, or tables with named columns) as a table that prints as aligned text, numbers right, and can be sorted, filtered, grouped and saved.\n'
  .. 'Example: print(moe.table({ { name = "a", loss = 1.5 } }, { columns = { "name", "loss" }, formats = { loss = "%.2f" } }):sort "loss")')

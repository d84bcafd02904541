-- moe.table(rows, options): text in aligned columns.
local function width_of(text) return utf8.len(text) or #text end

local function cell_text(value, format)
  if value == nil then return "" end
  if format and type(value) == "number" then return format:format(value) end
  if math.type(value) == "float" then return ("%.4g"):format(value) end
  return tostring(value)
end

local function columns_of(rows, options)
  if options.columns then return options.columns end
  local first, list = rows[1] or {}, {}
  if #first > 0 then
    for i = 1, #first do list[i] = i end
  else
    for key in pairs(first) do list[#list + 1] = key end
  end
  return list
end

local Table = { __name = "table" }
Table.__tostring = function(t) return t.text end

local function make(rows, options)
  if type(rows) ~= "table" then moe.fail { op = "moe.table: rows", got = type(rows), want = "a list of rows" } end
  options = moe.check_keys(options or {}, { "columns", "titles", "formats", "title" }, "moe.table: options")
  local columns, formats, titles = columns_of(rows, options), options.formats or {}, options.titles or {}
  local head, lines, widths, numeric = {}, {}, {}, {}
  for c, key in ipairs(columns) do
    head[c] = tostring(titles[c] or titles[key] or (type(key) == "string" and key or ""))
    widths[c], numeric[c] = width_of(head[c]), #rows > 0
  end
  for r, row in ipairs(rows) do
    lines[r] = {}
    for c, key in ipairs(columns) do
      lines[r][c] = cell_text(row[key], formats[key] or formats[c])
      widths[c] = math.max(widths[c], width_of(lines[r][c]))
      numeric[c] = numeric[c] and (row[key] == nil or type(row[key]) == "number")
    end
  end
  local function join(cells)
    local out = {}
    for c, text in ipairs(cells) do
      local pad = (" "):rep(widths[c] - width_of(text))
      out[c] = numeric[c] and pad .. text or text .. pad
    end
    return (table.concat(out, "  "):gsub("%s+$", ""))
  end
  local out = {}
  if options.title then out[1] = options.title end
  local named = false
  for _, text in ipairs(head) do named = named or text ~= "" end
  if named then
    local rule = {}
    for c in ipairs(columns) do rule[c] = ("-"):rep(widths[c]) end
    out[#out + 1] = join(head)
    out[#out + 1] = table.concat(rule, "  ")
  end
  for _, cells in ipairs(lines) do out[#out + 1] = join(cells) end
  return setmetatable({ text = table.concat(out, "\n") }, Table)
end

return moe.document(make, "moe.table",
  'moe.table(rows, {columns = {"name", "loss"}, titles = {…}, formats = {loss = "%.3f"}, title =}): rows (lists, or tables with named columns) as aligned text; print it. Numbers stand right.')

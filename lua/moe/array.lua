-- moe.array(values, options): a tensor whose dims and places have names: prints, plots and saves itself.
local csv = require "moe.table.csv"
local Array = { __name = "array" }
local methods = {}

local function is_array(x) return getmetatable(x) == Array end
local function text_of(v)
  if math.type(v) == "float" then return ("%.4g"):format(v) end
  return tostring(v)
end

local function make(values, options)
  options = moe.check_keys(options or {}, { "dims", "labels", "name" }, "moe.array: options")
  if is_array(values) then
    options = { dims = options.dims or values.dims, labels = options.labels or values.labels, name = options.name or values.name }
    values = values.tensor
  end
  local tensor = type(values) == "table" and moe.tensor(values) or values
  if type(tensor) ~= "userdata" or not tensor.dim then moe.fail { op = "moe.array: values", got = type(values), want = "a tensor or nested lists of numbers" } end
  local dims, labels, shape = {}, {}, tensor.shape
  if options.dims and #options.dims ~= #shape then
    moe.fail { kind = "shape", op = "moe.array: dims", got = #options.dims .. " names", want = #shape .. ", one a dim" }
  end
  for i, size in ipairs(shape) do
    dims[i] = options.dims and tostring(options.dims[i]) or "dim_" .. i - 1
    for k = 1, i - 1 do
      if dims[k] == dims[i] then moe.fail { op = "moe.array: dims", got = '"' .. dims[i] .. '" twice', want = "a name of its own for each dim" } end
    end
    local given = options.labels and options.labels[dims[i]]
    if given and #given ~= size then moe.fail { kind = "shape", op = "moe.array: labels." .. dims[i], got = #given .. " labels", want = ("%d, one a place"):format(size) } end
    labels[dims[i]] = {}
    for k = 1, size do
      local label = k - 1
      if given then label = given[k] end
      labels[dims[i]][k] = label
    end
  end
  if options.labels then moe.check_keys(options.labels, dims, "moe.array: labels") end
  return setmetatable({ tensor = tensor, dims = dims, labels = labels, name = options.name or "value" }, Array)
end

-- --- access ---

local function dim_index(a, dim, op)
  if math.type(dim) == "integer" and dim >= 0 and dim < #a.dims then return dim + 1 end
  for i, name in ipairs(a.dims) do
    if name == dim then return i end
  end
  moe.check_keys({ [tostring(dim)] = true }, a.dims, op .. ": dim")
  moe.fail { op = op .. ": dim", got = tostring(dim), want = "one of " .. table.concat(a.dims, ", ") }
end

-- The array without dim i, at a 0-based place; a number where nothing is left.
local function without(a, i, place)
  local part = a.tensor:select(i - 1, place)
  if #a.dims == 1 then return part:item() end
  local dims = {}
  for k, name in ipairs(a.dims) do
    if k ~= i then dims[#dims + 1] = name end
  end
  local labels = {}
  for _, name in ipairs(dims) do labels[name] = a.labels[name] end
  return make(part, { dims = dims, labels = labels, name = a.name })
end

function methods.select(a, dim, label)
  local i = dim_index(a, dim, "array:select")
  local list, texts = a.labels[a.dims[i]], {}
  for k, l in ipairs(list) do
    if l == label then return without(a, i, k - 1) end
    texts[k] = tostring(l)
  end
  local want = #texts > 12 and table.concat(texts, ", ", 1, 12) .. ", …" or table.concat(texts, ", ")
  moe.fail { kind = "config", op = "array:select: " .. a.dims[i], got = tostring(label), want = "one of " .. want }
end
moe.document(methods.select, "array:select", "a:select(dim, label): the part of a dim (by name, or 0-based number) at a label: an array of one dim less, or a number.\nExample: print(moe.array({ 3, 4 }, { dims = { \"layer\" }, labels = { layer = { 1, 2 } } }):select(\"layer\", 2))")

function methods.to_tensor(a) return a.tensor end
moe.document(methods.to_tensor, "array:to_tensor", "a:to_tensor(): the values as a tensor, without names.")

function methods.to_table(a) return a.tensor:to_table() end
moe.document(methods.to_table, "array:to_table", "a:to_table(): the values as nested lists.")

-- Calls f(labels, value) for every place, the last dim the fastest.
local function each(a, f)
  local flat, place = a.tensor:reshape({ -1 }):to_table(), {}
  for i = 1, #a.dims do place[i] = 1 end
  for _, value in ipairs(flat) do
    local at = {}
    for i, name in ipairs(a.dims) do at[i] = a.labels[name][place[i]] end
    f(at, value)
    for i = #place, 1, -1 do
      place[i] = place[i] + 1
      if place[i] <= #a.labels[a.dims[i]] then break end
      place[i] = 1
    end
  end
end

function methods.rows(a)
  local list = {}
  each(a, function(at, value)
    local row = {}
    for i, name in ipairs(a.dims) do row[name] = at[i] end
    row.value = value
    list[#list + 1] = row
  end)
  local columns = { table.unpack(a.dims) }
  columns[#columns + 1] = "value"
  return moe.records(list, columns)
end
moe.document(methods.rows, "array:rows", "a:rows(): records, one a place: its labels by dim, and value.")

-- --- files ---

local function save_csv(a, path)
  local head, rows = { table.unpack(a.dims) }, {}
  head[#head + 1] = a.name
  each(a, function(at, value)
    at[#a.dims + 1] = value
    rows[#rows + 1] = at
  end)
  moe.fs.write(path, csv(head, rows))
end

local function save_npy(a, path) moe.save_npy(path, a.tensor.dtype == "bfloat16" and a.tensor:float() or a.tensor) end

-- JSON has no nan: such places are null.
local function save_json(a, path)
  local function clean(v)
    if type(v) ~= "table" then return v == v and v ~= math.huge and v ~= -math.huge and v or moe.null end
    local out = {}
    for i, x in ipairs(v) do out[i] = clean(x) end
    return out
  end
  moe.fs.write(path, moe.json.encode { name = a.name, dims = a.dims, labels = a.labels, shape = a.tensor.shape, values = clean(a.tensor:to_table()) })
end

local WRITERS = { csv = save_csv, npy = save_npy, json = save_json }
function methods.save(a, path)
  local write = type(path) == "string" and WRITERS[path:lower():match("%.(%w+)$") or ""]
  if not write then moe.fail { op = "array:save: path", got = type(path) == "string" and '"' .. path .. '"' or type(path), want = "a file name that ends in .csv, .npy or .json" } end
  write(a, path)
  return a
end
moe.document(methods.save, "array:save", "a:save(path): writes .csv (a line for each place: its labels and the value), .npy (values alone) or .json (names, labels, values). Returns a.")

-- --- plots ---

local function texts_of(list)
  local out = {}
  for i, l in ipairs(list) do out[i] = tostring(l) end
  return out
end
local function is_numeric(list)
  for _, l in ipairs(list) do
    if type(l) ~= "number" then return false end
  end
  return true
end

-- What viz.heatmap takes: a matrix or panels, and options with the names filled in.
function methods.heatmap_arguments(a, options)
  if #a.dims < 2 or #a.dims > 3 then moe.fail { kind = "shape", op = "viz.heatmap", got = #a.dims .. " dims", want = "2, or 3 for a panel each", hint = "a:select(dim, label) takes one away" } end
  local n = #a.dims
  local out = { rows = texts_of(a.labels[a.dims[n - 1]]), cols = texts_of(a.labels[a.dims[n]]), row_label = a.dims[n - 1], col_label = a.dims[n], scale_label = a.name }
  if not is_numeric(a.labels[a.dims[n - 1]]) then out.row_label = nil end
  if n == 3 then
    out.titles = {}
    for i, l in ipairs(a.labels[a.dims[1]]) do out.titles[i] = a.dims[1] .. " " .. tostring(l) end
  end
  for key, value in pairs(options or {}) do out[key] = value end
  return a.tensor, out
end
moe.document(methods.heatmap_arguments, "array:heatmap_arguments", "a:heatmap_arguments(options): values and options that viz.heatmap draws; it calls this by itself.")

function methods.plot(a, options)
  local o = {}
  for key, value in pairs(options or {}) do o[key] = value end
  local kind = o.kind or (#a.dims > 1 and "heatmap" or "bars")
  o.kind = nil
  if kind == "heatmap" then return moe.plot.heatmap(a, o) end
  if #a.dims > 2 then moe.fail { kind = "shape", op = "array:plot", got = #a.dims .. " dims", want = "1 or 2 for " .. tostring(kind) } end
  local along = a.labels[a.dims[#a.dims]]
  local series = {}
  if #a.dims == 1 then series[1] = { y = a.tensor }
  else
    for i, l in ipairs(a.labels[a.dims[1]]) do series[i] = { name = a.dims[1] .. " " .. tostring(l), y = a.tensor:select(0, i - 1) } end
  end
  o.x_label, o.y_label = o.x_label or a.dims[#a.dims], o.y_label or a.name
  if kind == "bars" then
    o.categories = o.categories or texts_of(along)
    return moe.plot.bars(series, o)
  elseif kind == "line" then
    for _, s in ipairs(series) do s.x = is_numeric(along) and along or nil end
    return moe.plot.line(series, o)
  end
  moe.fail { op = "array:plot: kind", got = tostring(kind), want = '"bars", "line" or "heatmap"' }
end
moe.document(methods.plot, "array:plot", "a:plot {kind = \"bars\" | \"line\" | \"heatmap\", …}: bars of one dim, a heat map of two, a panel each of three; the other options are those of viz.bars, viz.line and viz.heatmap. Returns a plot.")

-- --- printing ---
local MOST = 12

local function head_of(a)
  local sizes = {}
  for i, name in ipairs(a.dims) do sizes[i] = ("%s %d"):format(name, #a.labels[name]) end
  return ("%s [%s]"):format(a.name, table.concat(sizes, ", "))
end

-- 1-based places that are shown of a dim: all, or the first and last ones.
local function shown(count)
  local list = {}
  for i = 1, count do
    if count <= MOST or i <= MOST - 3 or i > count - 2 then list[#list + 1] = i
    elseif list[#list] ~= 0 then list[#list + 1] = 0 end
  end
  return list
end

local function matrix_text(values, row_name, row_labels, col_labels)
  local rows, titles = {}, { row_name }
  local cols = shown(#col_labels)
  for _, c in ipairs(cols) do titles[#titles + 1] = c == 0 and "…" or tostring(col_labels[c]) end
  for _, r in ipairs(shown(#row_labels)) do
    local row = { r == 0 and "…" or tostring(row_labels[r]) }
    for _, c in ipairs(cols) do row[#row + 1] = (r == 0 or c == 0) and "…" or text_of(values[r][c]) end
    rows[#rows + 1] = row
  end
  -- Texts, so that every column looks alike: numbers are set right by padding.
  for c = 2, #titles do
    local width = utf8.len(titles[c]) or #titles[c]
    for _, row in ipairs(rows) do width = math.max(width, utf8.len(row[c]) or #row[c]) end
    titles[c] = (" "):rep(width - (utf8.len(titles[c]) or #titles[c])) .. titles[c]
    for _, row in ipairs(rows) do row[c] = (" "):rep(width - (utf8.len(row[c]) or #row[c])) .. row[c] end
  end
  return tostring(moe.table(rows, { titles = titles }))
end

Array.__tostring = function(a)
  local out = { head_of(a) }
  local values = a.tensor:to_table()
  if #a.dims == 1 then
    local name = a.dims[1]
    out[2] = matrix_text({ values }, "", { a.name }, a.labels[name])
  elseif #a.dims == 2 then
    out[2] = matrix_text(values, a.dims[1] .. " \\ " .. a.dims[2], a.labels[a.dims[1]], a.labels[a.dims[2]])
  elseif #a.dims == 3 then
    for i, label in ipairs(a.labels[a.dims[1]]) do
      if i > 4 then out[#out + 1] = ("… %d more"):format(#values - 4) break end
      out[#out + 1] = ("%s %s"):format(a.dims[1], tostring(label))
      out[#out + 1] = matrix_text(values[i], a.dims[2] .. " \\ " .. a.dims[3], a.labels[a.dims[2]], a.labels[a.dims[3]])
    end
  end
  return table.concat(out, "\n")
end

Array.__len = function(a) return a.tensor.shape[1] or 0 end

-- Numbers index the first dim from 0, as in a tensor; other names are the array's, then the tensor's.
Array.__index = function(a, key)
  if methods[key] then return methods[key] end
  local tensor = rawget(a, "tensor")
  if math.type(key) == "integer" then
    local n = tensor.shape[1] or 0
    if key < -n or key >= n then moe.fail { kind = "shape", op = "array: index", got = tostring(key), want = ("0 … %d"):format(n - 1), hint = "arrays are 0-based: for i = 0, #a - 1 do … a[i] … end" } end
    return without(a, 1, key % n)
  end
  local value = tensor[key]
  if type(value) ~= "function" then return value end
  return function(self, ...) return value(is_array(self) and self.tensor or self, ...) end
end

-- Arithmetic keeps the names where the shape stays.
local function same_shape(x, y)
  if #x ~= #y then return false end
  for i = 1, #x do
    if x[i] ~= y[i] then return false end
  end
  return true
end
local function operator(f)
  return function(x, y)
    local like = is_array(x) and x or y
    local out = f(is_array(x) and x.tensor or x, is_array(y) and y.tensor or y)
    return same_shape(out.shape, like.tensor.shape) and make(out, { dims = like.dims, labels = like.labels, name = like.name }) or out
  end
end
Array.__add, Array.__sub = operator(function(x, y) return x + y end), operator(function(x, y) return x - y end)
Array.__mul, Array.__div = operator(function(x, y) return x * y end), operator(function(x, y) return x / y end)
Array.__unm = function(x) return make(-x.tensor, x) end
Array.__methods = methods
moe.document(Array, "array", "array: a tensor whose dims and places have names, from moe.array.")

return moe.document(make, "moe.array",
  "moe.array(values, {dims = {\"layer\", \"expert\"}, labels = {layer = {1, 2}}, name = \"tokens\"}): a labelled array: a tensor (or nested lists) with a name for every dim and a label for every place (0, 1, … where none is given). It prints as a table; a:select(dim, label), a[i] (0-based), #a, "
  .. "a:to_tensor(), a:to_table(), a:rows() (records), a:plot {…}, a:save \"x.csv\" | \"x.npy\" | \"x.json\", a.dims, a.labels, a.name; arithmetic, and every method of tensors, which give tensors."
  .. "\nExample: print(moe.array({ { 1, 2 }, { 3, 4 } }, { dims = { \"domain\", \"expert\" }, labels = { domain = { \"code\", \"text\" } } }))")

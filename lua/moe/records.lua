-- moe.records(list, columns): rows as a plain list that prints as a table and has moe.table's methods.
local MOST, SHOWN = 24, 20

local function as_table(list) return moe.table(list, { columns = getmetatable(list).columns, formats = getmetatable(list).formats }) end

local function make(list, columns)
  if type(list) ~= "table" then moe.fail { op = "moe.records: list", got = type(list), want = "a list of rows" } end
  if columns == nil and list[1] then
    columns = {}
    for key in pairs(list[1]) do columns[#columns + 1] = key end
  end
  local meta = { __name = "records", columns = columns, formats = {} }
  meta.__tostring = function(t)
    if #t == 0 then return "no records" end
    if #t <= MOST then return tostring(as_table(t)) end
    local first = setmetatable(table.move(t, 1, SHOWN, 1, {}), meta)
    return ("%s\n… %d more; :table() is all of them"):format(as_table(first), #t - SHOWN)
  end
  meta.__index = function(t, key)
    if type(key) ~= "string" then return nil end
    if key == "table" then return as_table end
    if #t == 0 then return nil end
    local whole = as_table(t)
    local method = whole[key]
    if type(method) ~= "function" then return method end
    return function(self, ...) return method(self == t and whole or self, ...) end
  end
  return setmetatable(list, meta)
end

return moe.document(make, "moe.records",
  "moe.records(list, columns): gives a list of rows (tables of named values) the methods and the printed form of moe.table; it stays a list: #r, r[1].loss, ipairs. r:table() is the table. Of more than 24 rows the first 20 are printed.\nExample: print(moe.records { { layer = 1, loss = 2.5 } })")

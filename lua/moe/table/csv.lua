-- Comma-separated values: csv(head, rows) of lists of cells; nil and moe.null are empty, all digits of a number are kept. Source: RFC 4180.

-- All digits that are needed to read the same number again.
local function exact(v)
  if v ~= v then return "nan" end
  local text = ("%.15g"):format(v)
  return tonumber(text) == v and text or ("%.17g"):format(v)
end

local function cell(v)
  local text
  if v == nil or v == moe.null then text = ""
  elseif math.type(v) == "float" then text = exact(v)
  elseif type(v) == "table" then text = moe.json.encode(v)
  else text = tostring(v) end
  return text:find('[",\r\n]') and '"' .. text:gsub('"', '""') .. '"' or text
end

return function(head, rows)
  local out = {}
  local function add(cells)
    local texts = {}
    for c = 1, #head do texts[c] = cell(cells[c]) end
    out[#out + 1] = table.concat(texts, ",")
  end
  add(head)
  for _, row in ipairs(rows) do add(row) end
  return table.concat(out, "\n") .. "\n"
end

-- moe.script_options(known, name): the key=value arguments of the script that runs, checked.
local function script_options(known, name)
  local given = rawget(_G, "arg") or { options = {} }
  local options, word = moe.check_keys(given.options, known, name), given[1]
  if word == nil then return options end
  -- "steps 100" and "--steps=100" were meant as steps=100.
  local key, value = word:match("^%-*([%w_]+)=?(.*)$")
  local hint
  for _, k in ipairs(known) do
    if k == key then hint = ("%s=%s"):format(key, value ~= "" and value or given[2] or "…") end
  end
  moe.fail { op = name, got = ('"%s", a word without "="'):format(word), want = "key=value with one of " .. table.concat(known, ", "), hint = hint }
end

return moe.document(script_options, "moe.script_options",
  "moe.script_options({\"steps\", \"seed\"}, name): arg.options, the key=value arguments of the script that runs; a key that is not among the known and a word without \"=\" are errors, which name the nearest. name begins the message."
  .. "\nExample: print(moe.script_options({ \"steps\", \"seed\" }, \"mine\").steps)")

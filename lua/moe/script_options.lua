-- moe.script_options(known, name): the key=value arguments of the script that runs, checked.
local function script_options(known, name)
  local given = rawget(_G, "arg") or { options = {} }
  local options, word = moe.check_keys(given.options, known, name), given[1]
  if word == nil then return options end
  -- "steps 100" and "--steps=100" were meant as steps=100.
  local key, value = word:match("^%-*([%w_]+)=(.*)$")
  key = key or word:match("^%-*([%w_]+)$")
  if key then moe.check_keys({ [key] = true }, known, name) end
  moe.fail { op = name, got = ('"%s", a word without "="'):format(word), want = "key=value with one of " .. table.concat(known, ", "),
    hint = key and ("%s=%s"):format(key, value or given[2] or "…") }
end

return moe.document(script_options, "moe.script_options",
  "moe.script_options({\"steps\", \"seed\"}, name): arg.options, the key=value arguments of the script that runs; a key that is not among the known and a word without \"=\" are errors, which name the nearest. name begins the message."
  .. "\nExample: print(moe.script_options({ \"steps\", \"seed\" }, \"mine\").steps)")

-- moe.script_options(known, name): the key=value arguments of the script that runs, checked.
local function script_options(known, name)
  local names, given = table.move(known, 1, #known, 1, {}), rawget(_G, "arg") or { options = {} }
  for key in pairs(known) do
    if type(key) == "string" then names[#names + 1] = key end
  end
  local options, word = moe.check_keys(given.options, names, name), given[1]
  if word ~= nil then
    -- "steps 100" and "--steps=100" were meant as steps=100.
    local key, value = word:match("^%-*([%w_]+)=(.*)$")
    key = key or word:match("^%-*([%w_]+)$")
    if key then moe.check_keys({ [key] = true }, names, name) end
    moe.fail { op = name, got = ('"%s", a word without "="'):format(word), want = "key=value with one of " .. table.concat(names, ", "),
      hint = key and ("%s=%s"):format(key, value or given[2] or "…") }
  end
  local out = {}
  for _, key in ipairs(names) do
    local value, default = options[key], known[key]
    if value == nil then value = default end
    if type(default) == "string" then value = tostring(value)
    elseif default ~= nil and (type(value) ~= type(default) or math.type(default) == "integer" and math.type(value) ~= "integer") then
      moe.fail { op = name .. ": " .. key, got = tostring(value), want = ("%s, such as %s=%s"):format(math.type(default) == "integer" and "an integer" or "a " .. type(default), key, default) }
    end
    out[key] = value
  end
  return out
end

return moe.document(script_options, "moe.script_options",
  "moe.script_options({\"output_dir\", steps = 300}, name): the key=value arguments of the script that runs (arg.options), with values for those that are not given; a key that is not among these, a word without \"=\" and a value of another type than its default are errors. name begins the message."
  .. "\nExample: print(moe.script_options({ \"output_dir\", steps = 300 }, \"mine\").steps)")

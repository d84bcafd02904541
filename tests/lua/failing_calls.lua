-- 10^5 calls that fail, of all bindings in turn, leave nothing behind: resident memory stays where it was. Under ASan the same, and LeakSanitizer at the end.
-- `calls=1000000` makes more.
local here = arg[0]:match("^(.*)/") or "."
local check = dofile(here .. "/lib/check.lua")
local values = dofile(here .. "/lib/fuzz_values.lua")
local bindings = dofile(here .. "/lib/bindings.lua")
local list = bindings.all()
values.start { seed = 1, bindings = list, folder = check.folder() }

local function resident_bytes() return tonumber(moe.fs.read("/proc/self/statm"):match("^%d+ (%d+)")) * 4096 end

-- What may be given to any binding without harm: it is wrong everywhere, or nearly.
local t = moe.zeros { 2, 3 }
local odd = setmetatable({}, { __tostring = function() error("no text") end })
local ARGUMENTS = { {}, { false }, { print, print }, { values.freed "tensor" }, { odd, odd }, { { unknown_key = 1 } }, { "\0", "\0" }, { t, "x", { unknown_key = 1 } }, { t, t, t, t } }
local AFTER_SELF = { { odd }, { "\0", false }, { -100, 2 ^ 53 }, { { unknown_key = 1 } }, { print, print, print } }

-- Calls that fail, quickly.
local failing = {}
local function try(b, args)
  if b.name == "moe.model" and type(args[1]) == "table" then return end           -- {} is the default configuration: gigabytes
  if bindings.ENDS_PROGRAM[b.name] or values.is_long(b.name) or b.name:find(":free$") or b.name:find("__") then return end
  local start, ok, err = moe.clock(), pcall(b.f, table.unpack(args, 1, 6))
  if not ok and values.is_error(err) and moe.clock() - start < 2e-3 then failing[#failing + 1] = { b.f, args } end
end
for _, b in ipairs(list) do
  for _, args in ipairs(ARGUMENTS) do try(b, args) end
  local self = b.type and not b.field and values.object(b.type)
  for _, args in ipairs(self and AFTER_SELF or {}) do try(b, { self, table.unpack(args) }) end
end
values.stop()

check.test("errors: 10^5 failing calls leave no memory behind", function()
  check.is(#failing > 2000, #failing .. " calls that fail were found")
  local function make(count)
    for i = 1, count do
      local call = failing[i % #failing + 1]
      local args = call[2]
      if pcall(call[1], args[1], args[2], args[3], args[4]) then failing[i % #failing + 1] = failing[1] end       -- some fail for the first time only
    end
    collectgarbage() collectgarbage()
    return resident_bytes()
  end
  local calls = arg.options.calls or 100000
  local start = moe.clock()
  make(calls // 5)
  local before = make(calls // 5)
  local after = make(calls * 3 // 5)
  print(("# %d kinds of calls, %.0f a second; resident before %.1f MB, after %.1f MB"):format(#failing, calls / (moe.clock() - start), before / 1e6, after / 1e6))
  check.is(after - before < 6e6, ("%.1f MB more"):format((after - before) / 1e6))
end)

check.done()

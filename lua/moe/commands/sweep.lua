-- moelab sweep FILE.lua [key=value …] [--jobs N] [--retry] [--dry-run] [--json]: runs the points of a sweep that have no result.
local session, store = require "moe.sweep.session", require "moe.sweep.store"

-- What a point's row says, errors as their text, what is not finite as in the point's file.
local function row_of(p)
  return { id = p.id, status = p.status, values = p.values, budget = p.budget, secs = p.secs, error = p.error and p.error.text, result = store.plain_result(p.result or {}) }
end

local function show(sweep, given)
  if given.json then
    local list = {}
    for i, p in ipairs(sweep:points()) do list[i] = row_of(p) end
    print(moe.json.encode { sweep = sweep.name, folder = sweep.folder, points = list })
    return
  end
  print()
  print(given["dry-run"] and sweep:check() or sweep:table())
  if given["dry-run"] or #sweep:table("done") == 0 then return end
  if #sweep:settings() > 0 then
    print()
    print(sweep:agg())
  end
  sweep:report()
  print(("\n%s\nreport: %s/report.md"):format(sweep:status(), sweep.folder))
end

return function(words, options, given)
  local file = words[1]
  if not file then moe.fail { op = "moelab sweep", got = "no file", want = "a Lua file that returns moe.sweep { … }, or makes one" } end
  if not moe.fs.exists(file) then moe.fail { kind = "io", op = "moelab sweep", got = file, want = "a Lua file that is there" } end
  local chunk, problem = loadfile(file, "t")
  if not chunk then moe.fail { kind = "lua", op = problem } end
  arg = { [0] = file, table.unpack(words, 2) }
  arg.options = options
  local folder = file:match("^(.*)/[^/]*$") or "."
  package.path = folder .. "/?.lua;" .. package.path
  session.jobs, session.dry, session.quiet = tonumber(given.jobs), given["dry-run"] ~= nil, given.json ~= nil
  -- Nothing runs in a dry run, also not what a file without a sweep would train.
  local make_run = moe.run
  if session.dry then
    moe.run = function() moe.fail { op = "moelab sweep --dry-run", got = file .. ", which makes a run before a sweep", want = "a file that makes a sweep", hint = "moelab run " .. file .. " trains it" } end
  end
  local ok, result = pcall(chunk)
  moe.run = make_run
  if not ok and result ~= session.dry_end then error(result, 0) end
  local is_one = type(result) == "table" and getmetatable(result) == getmetatable(session.made[1])
  local list = is_one and { result } or session.made
  if #list == 0 then moe.fail { op = "moelab sweep", got = "a file without a sweep (" .. file .. ")", want = "a file that returns moe.sweep { … }, or makes one" } end
  for _, sweep in ipairs(list) do
    if not session.dry then sweep:run { retry = given.retry ~= nil } end
    show(sweep, given)
  end
  local failed = 0
  for _, sweep in ipairs(list) do failed = failed + #sweep:table("failed") end
  if failed > 0 then
    moe.fail { kind = "state", op = "moelab sweep", got = ("%d point%s failed"):format(failed, failed == 1 and "" or "s"), want = "results of all", hint = "--retry runs them again" }
  end
end

-- Every binding with arguments at random: each call gives a result or an error object; none ends the program, raises a bare text, or takes for ever.
--   moelab run tests/lua/fuzz.lua seconds=60 seed=7 only=tensor:      a longer run, another start, bindings whose name holds a text
-- GPUs are hidden from it: a kernel of a script that is called wrongly, or an id out of range, ends a device's context for the whole process. cuda=true shows them.
-- This script starts itself again in an empty folder (the child), watches it, and shows the last calls where it ends badly. lib/fuzz_values.lua has the arguments.
local here = arg[0]:match("^(.*)/") or "."
local check = dofile(here .. "/lib/check.lua")
local o = arg.options
local seed, seconds = o.seed or 1, o.seconds or (os.getenv "MOELAB_TEST_ALL" == "1" and 60 or 10)
local is_sanitized = os.getenv "ASAN_OPTIONS" or os.getenv "TSAN_OPTIONS"
local SLOW_SECS, HANGS_SECS = is_sanitized and 60 or 5, is_sanitized and 300 or 60     -- the second without a further call: the child is ended

-- Lua's own functions with a few additions: where they are called wrongly they say what Lua says, as texts.
local LUAS_OWN = { print = true, reload = true, pairs = true, ipairs = true, ["table.sort"] = true, ["table.sort: less"] = true, ["io.write"] = true, ["file:write"] = true, ["coroutine.wrap"] = true, ["coroutine.resume"] = true }

-- --- the child: calls ---

local function child()
  local values = dofile(here .. "/lib/fuzz_values.lua")
  local bindings = dofile(here .. "/lib/bindings.lua")
  local list, types = bindings.all()
  values.start { seed = seed, bindings = list }
  io.output(assert(io.open("written", "w")))
  local ring <close> = assert(io.open(o.ring, "w"))
  local report = assert(io.open(o.report, "w"))
  local function say(line)
    report:write(line, "\n")
    report:flush()
  end

  for name in pairs(types) do
    if not values.makes(name) then say(("FINDING no object of type %s is made: add it to lib/fuzz_values.lua, or to its list of types that cannot be made"):format(name)) end
  end
  local called = {}
  for _, b in ipairs(list) do
    if not bindings.ENDS_PROGRAM[b.name] and (not o.only or b.name:find(o.only, 1, true)) then called[#called + 1] = b end
  end

  local found, num_calls, num_failed, kinds = {}, 0, 0, {}
  local function finding(b, what, text, call)
    local key = b.name .. what .. text:gsub("%d+", "0"):sub(1, 80)
    if found[key] then return end
    found[key] = true
    say(("FINDING %s: %s: %s\n  call %d: %s"):format(b.name, what, text:sub(1, 400), num_calls, call))
  end

  local function judge(b, ok, err, call)
    num_calls = num_calls + 1
    if ok then return end
    num_failed = num_failed + 1
    if values.is_error(err) then
      kinds[err.kind] = (kinds[err.kind] or 0) + 1
      local shown, text = pcall(tostring, err)
      if not shown then finding(b, "an error that cannot be shown", tostring(text), call)
      elseif err.kind == "internal" then finding(b, "an error of kind internal", text, call) end
    elseif not values.is_own_error(err) and not LUAS_OWN[b.name] then
      finding(b, "a bare error", tostring(err), call)
    end
  end

  local slot, SLOTS, WIDTH = 0, 12, 700
  local function protected(b, f, args, call)
    slot = (slot + 1) % SLOTS
    ring:seek("set", slot * WIDTH)
    ring:write((("%8d %s"):format(num_calls, call:gsub("%c", "?")) .. (" "):rep(WIDTH)):sub(1, WIDTH - 1), "\n")
    ring:flush()
    local start = moe.clock()
    local results = table.pack(pcall(f, table.unpack(args, 1, args.n)))
    local secs = moe.clock() - start
    if secs > SLOW_SECS then finding(b, "a slow call", ("%.1f s"):format(secs), call) end
    judge(b, results[1], results[2], call)
    return results
  end

  local stop, round = moe.clock() + seconds, 0
  local covered = #called == 0
  while moe.clock() < stop do
    round = round + 1
    values.shuffle(called)
    for _, b in ipairs(called) do
      if moe.clock() > stop then break end
      local f, args, how = values.call(b)
      local results = protected(b, f, args, how .. values.describe(args))
      -- Iterators that came out are used, objects become arguments of later calls.
      if results[1] then
        if type(results[2]) == "function" and results[2] ~= args[1] then
          for _ = 1, 2 do protected(b, results[2], { results[3], results[4], n = 2 }, how .. values.describe(args) .. ", its iterator") end
        end
        values.keep(results)
      end
      values.used(b)
    end
    covered = covered or moe.clock() <= stop
    if round % 3 == 0 then collectgarbage() end
  end
  if not covered and not o.only then say("NOTE not every binding was called once: " .. seconds .. " s were too few") end
  local texts = {}
  for kind, n in pairs(kinds) do texts[#texts + 1] = ("%s %d"):format(kind, n) end
  say(("DONE %d calls of %d bindings in %d rounds, %d failed: %s"):format(num_calls, #called, round, num_failed, table.concat(texts, ", ")))
  values.stop()
end

if o.ring then
  child()
  return
end

-- --- the parent: watches ---

local function quoted(text) return "'" .. text:gsub("'", "'\\''") .. "'" end
local function absolute(path)
  if path:sub(1, 1) == "/" then return path end
  local pipe = io.popen("pwd")
  local folder = pipe:read("l")
  pipe:close()
  return folder .. "/" .. path
end

local function lines_of(path)
  local list = {}
  for line in (moe.fs.exists(path) and moe.fs.read(path) or ""):gmatch("[^\n]+") do list[#list + 1] = line end
  return list
end

check.test(("fuzz: every binding, arguments at random, seed %s, %s s"):format(seed, seconds), function()
  local folder = check.folder()
  local scratch, ring, report, out = folder .. "/scratch", folder .. "/ring", folder .. "/report", folder .. "/out"
  moe.fs.mkdir(scratch)
  -- Where a limit can be set, what asks for too much memory gets an error of kind memory; a GPU's driver and a sanitizer reserve more than any limit.
  local limited = not o.cuda and not is_sanitized and (o.limit_gib or 10) > 0
  local line = ("cd %s && export HOME=%s TMPDIR=%s OMP_NUM_THREADS=2 %s && %s exec %s run %s ring=%s report=%s seed=%s seconds=%s %s"):format(quoted(scratch), quoted(scratch), quoted(scratch), o.cuda and "" or "CUDA_VISIBLE_DEVICES=",
    limited and ("ulimit -v %d &&"):format((o.limit_gib or 10) * 2 ^ 20 // 1 | 0) or "", quoted(moe.executable()), quoted(absolute(arg[0])), quoted(ring), quoted(report), seed, seconds, o.only and quoted("only=" .. o.only) or "")
  local process <close> = moe.spawn({ "sh", "-c", line }, { output = out })
  local last, changed = "", moe.clock()
  local code
  repeat
    code = process:wait { timeout_secs = 0.5 }
    local now = moe.fs.exists(ring) and moe.fs.read(ring) or ""
    if now ~= last then last, changed = now, moe.clock() end
    if not code and moe.clock() - changed > (o.patience or HANGS_SECS) then code = "a call that does not end" process:kill() end
  until code
  for name, why in pairs(dofile(here .. "/lib/bindings.lua").ENDS_PROGRAM) do print(("# not called: %s (%s)"):format(name, why)) end
  local done, problems = false, {}
  for _, l in ipairs(lines_of(report)) do
    if l:find("^DONE") then done = true print("# " .. l) elseif l:find("^NOTE") then print("# " .. l) else problems[#problems + 1] = l end
  end
  if code ~= 0 or not done then
    problems[#problems + 1] = ("the child ended with %s; its last calls:"):format(code)
    local calls = lines_of(ring)
    table.sort(calls, function(a, b) return (tonumber(a:match("^ *(%d+)")) or 0) < (tonumber(b:match("^ *(%d+)")) or 0) end)
    for _, l in ipairs(calls) do problems[#problems + 1] = "  " .. l:gsub("%s+$", "") end
    local text = lines_of(out)
    for i = math.max(1, #text - 60), #text do problems[#problems + 1] = "  | " .. text[i]:sub(1, 300) end
  end
  if #problems > 0 then error(table.concat(problems, "\n  "), 0) end
end)

check.done()

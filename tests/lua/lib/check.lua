-- What the scripts of tests/lua share: "ok sentence" and "not ok sentence" lines, and an exit code.
local check = { failed = 0 }

function check.test(sentence, f)
  local ok, err = pcall(f)
  if ok then
    print("ok " .. sentence)
  else
    check.failed = check.failed + 1
    print("not ok " .. sentence .. "\n  " .. tostring(err) .. (type(err) == "table" and err.where and " at " .. err.where or ""))
  end
end

function check.equal(got, want, what)
  if got ~= want then error(("%sgot %s, want %s"):format(what and what .. ": " or "", tostring(got), tostring(want)), 2) end
end

function check.near(got, want, tolerance, what)
  if not (math.abs(got - want) <= (tolerance or 1e-6)) then error(("%sgot %.9g, want %.9g"):format(what and what .. ": " or "", got, want), 2) end
end

function check.is(value, what)
  if not value then error(what or "not true", 2) end
end

function check.contains(text, part)
  if not tostring(text):find(part, 1, true) then error(("%q is not in %q"):format(part, tostring(text)), 2) end
end

-- The error object that f raises; its kind, and texts that its message must hold.
function check.raises(kind, f, ...)
  local ok, err = pcall(f)
  if ok then error("nothing was raised, want kind " .. kind, 2) end
  if type(err) ~= "table" then error("a bare error was raised: " .. tostring(err), 2) end
  check.equal(err.kind, kind, "kind of " .. tostring(err))
  for _, part in ipairs { ... } do check.contains(tostring(err), part) end
  return err
end

-- Runs the program with a command line; gives output (with errors) and exit code. After `limit_secs` it is ended.
function check.moelab(line, limit_secs)
  local pipe = io.popen("readlink /proc/$PPID/exe")
  local program = pipe:read("l")
  pipe:close()
  local guard = limit_secs and ("timeout -k 5 %d "):format(limit_secs) or ""
  pipe = io.popen(("{ %s'%s' %s; } 2>&1; echo \"exit $?\""):format(guard, program, line))
  local out = pipe:read("a")
  pipe:close()
  local text, code = out:match("^(.*)exit (%d+)\n$")
  return text, tonumber(code)
end

-- Whether programs of several ranks start here; where not, for want of MPI, the sentence counts as skipped.
function check.has_ranks(sentence)
  local out = check.moelab("--threads 1 -n 2 -e 'moe.num_ranks'")
  if out:find("^2\n") then return true end
  check.is(out:find("mpirun", 1, true) or out:find("MPI", 1, true), "two ranks do not start, and not for want of MPI: " .. out)
  print("ok " .. sentence .. " # skip no MPI here")
  return false
end

-- Runs a script in the background, interrupts it (or sends another signal) once it has made the file `ready`, and gives output and exit code. A program
-- that does not end is killed after a minute.
function check.interrupted(script, ready, signal)
  os.remove(ready)
  return check.moelab(([[run '%s' & pid=$!; n=0
    while [ ! -e '%s' ] && [ $n -lt 1200 ]; do sleep 0.05; n=$((n + 1)); done
    kill -%s $pid; (sleep 60; kill -KILL $pid) > /dev/null 2>&1 & guard=$!
    wait $pid; code=$?; kill $guard; (exit $code)]]):format(script, ready, signal or "INT"))
end

-- A fresh folder; removed by done().
function check.folder()
  check.made = check.made or {}
  local path = os.tmpname()
  os.remove(path)
  moe.fs.mkdir(path)
  table.insert(check.made, path)
  return path
end

function check.done()
  for _, path in ipairs(check.made or {}) do moe.fs.remove(path, { recursive = true }) end
  if check.failed > 0 then os.exit(1, true) end
end

return check

-- What sweeps are made of and scripts use alone: processes, tables, statistics.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()

test("processes: codes, output, waiting, stopping", function()
  local file = folder .. "/out.txt"
  equal(moe.spawn({ "sh", "-c", "echo hello; exit 3" }, { output = file }):wait(), 3)
  equal(moe.fs.read(file), "hello\n")
  local long, short = moe.spawn { "sleep", "60" }, moe.spawn { "true" }
  local i, code = moe.wait_any { long, short }
  equal(i, 2)
  equal(code, 0)
  equal(long:poll(), nil)
  equal(long:wait { timeout_secs = 0.02 }, nil)
  equal(moe.wait_any({ long }, { timeout_secs = 0.02 }), nil)
  equal(long:stop(), 128 + 15)
  equal(moe.spawn({ "sleep", "60" }):kill(), 128 + 9)
  local pid
  do
    local p <close> = moe.spawn { "sleep", "60" }
    pid = p.pid
    is(moe.fs.exists("/proc/" .. pid))
  end
  is(not moe.fs.exists("/proc/" .. pid), "a closed process still runs")
  raises("io", function() moe.spawn { "no-such-program-here" } end, "no-such-program-here")
  raises("usage", function() moe.spawn {} end)
  raises("usage", function() moe.wait_any {} end)
  raises("usage", function() moe.wait_any { 3 } end)
  short:free()
  raises("state", function() short:poll() end)
end)

test("tables: sorting, filtering, grouping and saving keep every digit", function()
  local t = moe.table { { name = "b", x = 0.1 }, { name = "a", x = 0 / 0 }, { name = "c" }, { name = "a", x = -2 } }
  local function names(of) return table.concat(of:column "name") end
  equal(names(t:sort "x"), "abac")
  equal(names(t:sort("x", { descending = true })), "baac")
  equal(names(t:sort { "name", "x" }), "aabc")
  equal(names(t:filter { name = "a" }), "aa")
  equal(names(t:filter(function(row) return row.x and row.x < 1 end)), "ba")
  equal(t:column "x"[3], moe.null)
  equal(t:with("y", function(row) return row.x and 2 * row.x end)[4].y, -4)
  equal(t[4].y, nil)
  equal(t:select { "x" }:csv(), "x\n0.1\nnan\n\n-2\n")
  equal(moe.table({ { a = 'say "x", y' }, { a = 1 / 3 } }):csv(), 'a\n"say ""x"", y"\n0.33333333333333331\n')
  contains(moe.table({ { a = "x|y", b = 1 } }):markdown(), "| x\\|y | 1 |")
  local path = folder .. "/t.json"
  moe.table({ { a = 1, b = "x" } }):save(path)
  equal(moe.json.decode(moe.fs.read(path))[1].b, "x")
  local n = 0
  for first, rows in t:group { "name" }:each() do n = n + #rows * (first.name == "a" and 10 or 1) end
  equal(n, 22)
  equal(#t, 4)
  equal(t:agg { top = { "x", "max" } }[1].n, 4)
  local odd = moe.table { { k = 1, x = 1, y = 5 }, { k = 1, x = 0 / 0, y = 6 }, { k = 1, x = math.huge, y = 7 }, { k = 1, y = 8 } }:agg { "x", "y", worst = { "x", "max" } }
  equal(table.concat(odd.columns, " "), "n x x_std x_ci y y_std y_ci y_n worst")
  is(odd[1].n == 1 and odd[1].x == 1 and odd[1].y == 6.5 and odd[1].y_n == 4 and odd[1].worst ~= odd[1].worst, tostring(odd))
  raises("usage", function() t:sort "z" end)
  raises("usage", function() t:save "x.bin" end)
  raises("usage", function() t:filter(3) end)
  local none_listed = moe.table { { x = 0 / 0, y = 1 }, { x = 2, y = 3 } }:agg()
  equal(none_listed[1].n, 2) equal(none_listed[1].x, 2.0) equal(none_listed[1].x_n, 1)
  raises("usage", function() t:group { "name" }:agg { y = { "x", "maen" } } end, 'did you mean "mean"?')
  raises("usage", function() return t.sorted end)
  raises("usage", function() moe.table { 3 } end)
end)

test("statistics: Student's t as in the tables, means and spread by hand", function()
  -- Two-sided 95 % and 99 %: Abramowitz and Stegun, table 26.10.
  for df, want in pairs { [1] = 12.706, [2] = 4.303, [3] = 3.182, [4] = 2.776, [5] = 2.571, [9] = 2.262, [30] = 2.042, [120] = 1.980 } do near(moe.statistics.student_t(0.95, df), want, 6e-4, "df " .. df) end
  near(moe.statistics.student_t(0.99, 4), 4.604, 6e-4)
  near(moe.statistics.student_t(0.99, 7), 3.499, 6e-4)
  near(moe.statistics.mean { 1, 2, 6 }, 3)
  equal(table.concat(moe.statistics.finite { 1, 0 / 0, "x", -1 / 0, 2 }, " "), "1 2")
  raises("usage", function() moe.statistics.finite(3) end, "moe.statistics.finite")
  near(moe.statistics.std { 1, 2, 6 }, math.sqrt(7))
  equal(moe.statistics.median { 5, 1, 2 }, 2)
  equal(moe.statistics.median { 5, 1, 2, 4 }, 3)
  local mean, half = moe.statistics.interval { 2, 4 }
  near(mean, 3)
  near(half, 12.7062 * math.sqrt(2) / math.sqrt(2), 1e-4)
  is(moe.statistics.std { 1 } ~= moe.statistics.std { 1 })
  raises("usage", function() moe.statistics.mean {} end)
  raises("usage", function() moe.statistics.student_t(2, 3) end)
  raises("usage", function() moe.statistics.student_t(0.9, 1.5) end)
end)

check.done()

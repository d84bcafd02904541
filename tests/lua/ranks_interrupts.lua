-- An interrupt that reaches one rank alone: a terminal's or scheduler's signal to one process, or ranks on other machines.
local ranks = dofile(arg[0]:match("^(.*)/") .. "/lib/ranks.lua")
local check, write = ranks.check, ranks.write
local test, equal, is, contains = check.test, check.equal, check.is, check.contains

if not check.has_ranks("an interrupt of one rank") then return check.done() end

-- Which rank is interrupted, and what all do meanwhile. Rank 0 passes its interrupts on to ranks of its machine, the others do not.
local CASES = {
  { "training", 0, "run:train(100000)" },
  { "training", 1, "run:train(100000)" },
  { "steps that a pcall holds", 1, "while true do pcall(run.train, run, 100) end" },
  { "calls", 0, "while true do os.time() end" },
  { "calls that a pcall holds", 1, "while true do pcall(os.time) end" },
  { "the wait for an evaluation", 1, "while true do if moe.rank == 0 then moe.sleep(0.5) end run:evaluate { max_batches = 1 } end" },
  { "a job's wait", 0, "local job = run:start(100000) while true do pcall(job.wait, job) end" },
}
for _, case in ipairs(CASES) do
  local name, rank, code = table.unpack(case)
  test(("an interrupt of rank %d alone ends %s on both"):format(rank, name), function()
    local path = write("interrupted", ([=[
      local run = small { steps = 100000 }
      run:train(1)
      moe.on(%d, function() moe.fs.write(arg[1], ("%%d"):format(io.open("/proc/self/stat"):read("n"))) end)
      %s
    ]=]):format(rank, code))
    local start = moe.clock()
    local text, exit_code = ranks.interrupted(path)
    equal(exit_code, 130, text)
    contains(text, "interrupted")
    is(moe.clock() - start < 30, ("took %.0f s: %s"):format(moe.clock() - start, text))
  end)
end

test("an interrupt that only rank 0 has reaches the others at their next call, and no pcall holds it", function()
  local text, code = ranks.run(2, write("first", [=[
    if moe.rank == 0 then moe.fail { kind = "interrupted", op = "interrupted" } end
    while true do pcall(os.time) end
  ]=]))
  equal(code, 130, text)
end)

check.done()

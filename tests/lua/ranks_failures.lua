-- Four ranks, one of which fails amid a step's collectives, by data that only it has: all get its error, and the run goes on as if the step had not begun.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, is = check.test, check.equal, check.is

local folder = check.folder()
if not check.has_ranks("ranks") then return check.done() end

local script = folder .. "/failures.lua"
moe.fs.write(script, [=[
local function small(distributed)
  return moe.run { console = false, log = false, config = moe.config {
    deterministic = true,
    model = { num_layers = 4, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 32, init_method_std = 0.06,
      mla = { d_model = 16, d_latent = 8, num_heads = 2, qk_nope_head_dim = 4, qk_rope_head_dim = 4, v_head_dim = 4 },
      moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 8, num_shared_experts = 1, bias_update_speed = 0.01 } },
    training = { global_batch_size = 8, micro_batch_size = 1, seq_length = 16, train_steps = 1000, learning_rate = 3e-3 },
    data = { dataset_type = "synthetic", synthetic = { domains = 3 } }, validation = { enabled = false, max_batches = 2 },
    distributed = distributed, checkpointing = { enabled = false, save_on_exit = false } } }
end
-- Tokens that the model does not have, on one rank; the others are by then in the step's collectives, or on their way.
local function breaks(run, rank)
  run.data = function(m)
    local ids = moe.zeros({ m.sequences, m.seq_length }, { dtype = "int64" })
    if moe.rank == rank then ids = ids + 9999 end
    return ids
  end
end
local layouts = { { expert_parallel_size = 4 }, { tensor_parallel_size = 2, expert_parallel_size = 2 }, { pipeline_parallel_size = 2 }, { zero_stage = 3 } }
for i, layout in ipairs(layouts) do
  local want, run = small(layout), small(layout)
  want:train(1)
  run:train(1)
  local before = moe.clock()
  local loss = want:train(1).loss
  local start = moe.clock()
  local step_secs = start - before
  for time = 1, 5 do
    local rank = (time + i) % 4
    breaks(run, rank)
    local ok, e = pcall(run.train, run, 1)
    assert(not ok and e.kind == "data" and e.op == "model: token ids" and run.step == 1, tostring(e))
    -- Under tensor parallel two ranks have the same sequences, but this function gives each its own.
    assert(e.rank == rank, "rank " .. e.rank .. " instead of " .. rank)
    run:undo()
  end
  local secs = moe.clock() - start
  assert(secs < 5 * (1 + 5 * step_secs), "took " .. secs .. " s, a step takes " .. step_secs)
  print(i, run:train(1).loss == loss, run:evaluate().loss == want:evaluate().loss)
end
-- In the background: the job ends on all, and the run goes on.
local run = small(layouts[1])
breaks(run, 2)
local job = run:start(5)
local ok, e = pcall(job.wait, job)
print("job", ok, e.rank, e.op, job:status())
run:undo()
print("goes on", run:train(1).step)
]=])

test("ranks: what fails on one rank amid collectives arrives on all, again and again, and the run goes on bit for bit", function()
  local text, code = check.moelab(("--threads 1 run -n 4 '%s'"):format(script))
  equal(code, 0, text)
  for i = 1, 4 do is(text:find(i .. "\ttrue\ttrue", 1, true), text) end
  is(text:find("job\tfalse\t2\tmodel: token ids\tfailed", 1, true), text)
  is(text:find("goes on\t1", 1, true), text)
end)

check.done()

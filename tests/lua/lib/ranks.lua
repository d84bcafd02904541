-- What the scripts of tests/lua/ranks*.lua share: programs for several ranks that begin alike.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local ranks = { check = check, folder = check.folder() }

-- What every script begins with: a small run, and prints that are kept, so that ranks can be compared in what they would have printed.
local HEAD = [=[
local said, print_line = {}, print
function print(...)
  local words = {}
  for i = 1, select("#", ...) do words[i] = tostring((select(i, ...))) end
  said[#said + 1] = table.concat(words, "\t")
  print_line(...)
end
-- Raises where a rank has said anything else than rank 0.
local function all_said_the_same()
  local first = moe.on(0, function() return table.concat(said, "\n") end)
  for r = 1, moe.num_ranks - 1 do
    local text = moe.on(r, function() return table.concat(said, "\n") end)
    if text ~= first then error("rank " .. r .. " would print:\n" .. text .. "\ninstead of:\n" .. first) end
  end
end
-- On all ranks the values that f gives on each.
local function each(f)
  local list = {}
  for r = 0, moe.num_ranks - 1 do list[#list + 1] = tostring(moe.on(r, f)) end
  return table.concat(list, " ")
end
local function shown(ok, e)
  if ok then return "no error" end
  return ("%s rank %d: %s | %s | traceback %s"):format(e.kind, e.rank, e.op, e.got, tostring(e.traceback ~= ""))
end
local function small(options)
  return moe.run { console = false, log = false, config = moe.config {
    experiment_name = "small", deterministic = true,
    model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 32, init_method_std = 0.06,
      mla = { d_model = 16, d_latent = 8, num_heads = 2, qk_nope_head_dim = 4, qk_rope_head_dim = 4, v_head_dim = 4 },
      moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 8, num_shared_experts = 1, bias_update_speed = 0.01 } },
    training = { global_batch_size = 4, micro_batch_size = 1, seq_length = 16, train_steps = options and options.steps or 1000, learning_rate = 3e-3 },
    data = { dataset_type = "synthetic", synthetic = { domains = 3 } }, validation = { enabled = false, max_batches = 2 },
    distributed = options and options.distributed, checkpointing = { enabled = false, save_on_exit = false } } }
end
]=]

-- A script with that head; its path.
function ranks.write(name, code)
  local path = ranks.folder .. "/" .. name .. ".lua"
  moe.fs.write(path, HEAD .. code)
  return path
end
-- Its output and exit code on so many ranks; arg[1] is a fresh folder. `words`: more of the command line, such as "< file". Ranks that wait for each other for ever are ended.
function ranks.run(n, path, words) return check.moelab(("--threads 1 run -n %d '%s' '%s' %s"):format(n, path, check.folder(), words or ""), 120) end
-- The same on two, where arg[1] is a file to which one of them writes its process id: that one alone is then interrupted.
function ranks.interrupted(path)
  local ready = check.folder() .. "/ready"
  return check.moelab(([[--threads 1 run -n 2 '%s' '%s' & pid=$!; n=0
    while [ ! -s '%s' ] && [ $n -lt 600 ]; do sleep 0.05; n=$((n + 1)); done
    sleep 0.2; kill -INT $(cat '%s'); (sleep 40; kill -TERM $pid; sleep 5; kill -KILL $pid) > /dev/null 2>&1 & guard=$!
    wait $pid; code=$?; kill $guard; (exit $code)]]):format(path, ready, ready, ready))
end
-- Where `moelab run` says more than the script, such as what mpirun adds to a failure.
function ranks.line_of(text, part)
  for line in text:gmatch("[^\n]+") do
    if line:find(part, 1, true) then return line end
  end
end

return ranks

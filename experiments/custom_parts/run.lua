-- Five parts of a run, written in Lua: a router's score, a balance strategy, a schedule, a data source, an optimizer's step.
-- moelab run experiments/custom_parts/run.lua steps=60
local options = moe.check_keys(arg.options, { "steps" }, "experiment")
local steps = options.steps or 60
local cfg = moe.config "cpu_tiny":with {
  model = { num_layers = 2, vocab_size = 264, moe = { num_experts = 8, num_experts_per_token = 2 } },
  training = { seq_length = 64, global_batch_size = 4, micro_batch_size = 2, train_steps = steps, optimizer = "sgd", momentum = 0.9, grad_clip = 1 },
  data = { dataset_type = "synthetic" }, validation = { enabled = false },
}

-- A score: softplus instead of a sigmoid, with its gradient.
local function score(logits) return (1 + logits:exp()):log() end

-- A balance: the bias follows a running share of the load (proportional, not by sign).
local function balance(counts, bias, m)
  local load = counts:to("fp64") / counts:to("fp64"):mean()
  return 0.9 * bias + 0.02 * (1 - load)
end

-- A schedule: ten steps up, then 1 / sqrt(step).
local function schedule(step) return 0.3 * math.min(step / 10, (10 / step) ^ 0.5) end

-- Data: sequences that count up from a random start, so that the next token is known.
local function counting(m)
  local rows = {}
  for i = 1, m.sequences do rows[i] = moe.arange(m.seq_length) + math.random(0, 255 - m.seq_length) end
  return moe.stack(rows)
end

-- An optimizer: the sign of a momentum (Lion's step; Chen et al., 2302.06675).
local function lion(name, value, grad, state, m)
  local c = 0.9 * state[1] + 0.1 * grad
  state[1]:copy_(0.99 * state[1] + 0.01 * grad)
  return value - 0.01 * m.lr * (c:gt(0):to(value.dtype) - c:lt(0):to(value.dtype))
end

local parts = {
  plain = function() end,
  score = function(run) run.model.router.score = score end,
  balance = function(run) run.model.router.balance = balance end,
  schedule = function(run) run.schedule = schedule end,
  data = function(run) run.data = counting end,
  optimizer = function(run) run.optimizer = lion end,
}
local rows = {}
for _, name in ipairs { "plain", "score", "balance", "schedule", "data", "optimizer" } do
  local run = moe.run { config = cfg, name = "custom-" .. name, console = false, log = false }
  parts[name](run)
  local m = run:train(steps)
  rows[#rows + 1] = { part = name, loss = m.loss, maxvio = m.maxvio, lr = m.lr }
end
print(moe.table(rows, { columns = { "part", "loss", "maxvio", "lr" } }))

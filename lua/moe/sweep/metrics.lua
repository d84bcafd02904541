-- Names of results that a sweep is asked for, checked as soon as they can be known: before the first point where the sweep trains by itself, else
-- when the first point has ended.
local metrics = {}

-- What require "moe.sweep.train" gives; validation_loss comes with validation.enabled.
local TRAINED = { "loss", "maxvio", "drop_rate", "steps", "tokens", "tokens_per_sec" }

-- Names of the numbers that the points give, sorted; none while nothing is known.
local function known_names(s)
  local seen, names = {}, {}
  if s.trains then
    for _, name in ipairs(TRAINED) do seen[name] = true end
    if s.validates == nil then                          -- reading a configuration's key costs more than all else here
      s.validates = false
      for _, round in ipairs(s.rounds) do
        for _, p in ipairs(round) do s.validates = s.validates or p.config.validation.enabled end
      end
    end
    if s.validates then seen.validation_loss = true end
  end
  for _, round in ipairs(s.rounds) do
    for _, p in ipairs(round) do
      for name, v in pairs(p.result or {}) do
        if type(v) == "number" then seen[name] = true end
      end
    end
  end
  for name in pairs(seen) do names[#names + 1] = name end
  table.sort(names)
  return names, seen
end

--- Raises where a result of this name cannot come, or none of the points that have ended gave it. `more`: further names that will do.
function metrics.check(s, name, op, more)
  local names, seen = known_names(s)
  if #names == 0 or seen[name] then return end
  if s.trains and name == "validation_loss" then
    moe.fail { op = op, got = '"validation_loss" without validation', want = "one of " .. table.concat(names, ", "), hint = "validation = { enabled = true } in base" }
  end
  moe.check_keys({ [tostring(name)] = true }, table.move(more or {}, 1, #(more or {}), #names + 1, names), op)
end

--- The result that a round of halving is ranked by.
function metrics.objective(s)
  if s.halving.by or s.metric then return s.halving.by or s.metric end
  local _, seen = known_names(s)
  return seen.validation_loss and "validation_loss" or "loss"
end

--- All that moe.sweep { … } names.
function metrics.check_all(s)
  if s.metric then metrics.check(s, s.metric, "moe.sweep: metric") end
  if s.halving then metrics.check(s, metrics.objective(s), "moe.sweep: halving: by") end
end

return metrics

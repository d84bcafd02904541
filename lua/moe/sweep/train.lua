-- What a sweep does at a point unless told otherwise: train the configuration, and say how it went.
local function train(point, options)
  local run <close> = moe.run(options)
  local total, tail = run.num_steps, math.max(1, run.num_steps // 10)
  local sums, count, secs, last = { loss = 0.0, maxvio = 0.0, drop_rate = 0.0 }, 0, 0.0, nil
  for step, m in run:steps(total) do
    last, secs = m, secs + m.step_secs
    if step > total - tail and not m.skipped then
      count = count + 1
      for name, sum in pairs(sums) do sums[name] = sum + m[name] end
    end
    point.progress(step / total, ("step %d/%d loss %.3f"):format(step, total, m.loss))
  end
  if run.stopping then moe.fail { kind = "interrupted", op = "interrupted" } end
  local result = { steps = run.step, folder = run.folder }
  if last then
    result.tokens, result.tokens_per_sec = last.tokens, last.tokens / secs
    result.loss, result.maxvio = sums.loss / count, sums.maxvio / count            -- nan where all of these steps were skipped: it diverged
    if sums.drop_rate > 0 then result.drop_rate = sums.drop_rate / count end
  end
  if run.config.validation.enabled then result.validation_loss = run:evaluate().loss end
  return result
end

return moe.document(train, "moe.sweep.train",
  "require \"moe.sweep.train\": function(point, run_options) that moe.sweep calls where no fn is given: trains the point's configuration and returns loss, maxvio (largest load over the mean, less 1; both means of the last tenth of the steps, nan where all of these were skipped), "
  .. "drop_rate where tokens were dropped, validation_loss (nats a token, where validation.enabled), steps, tokens, tokens_per_sec and folder.")

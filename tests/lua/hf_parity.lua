-- Every folder of tests/golden/hf through moe.load_hf: logits, loss, every parameter's gradient and the chosen experts against
-- what transformers computed (tests/golden/make_hf.py), float32. Prints the worst relative differences as a table.
local here = arg[0]:match("^(.*)/")
local check = dofile(here .. "/lib/check.lua")
local golden = arg.options.golden or here .. "/../golden/hf"
local LOGITS, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4

--- ‖got − want‖ / ‖want‖, in float64; an error where something is not finite.
local function relative(got, want, what)
  got, want = got:to("cpu"):to("fp64"), want:to("fp64")
  if not got:is_finite() then error(what .. " is not finite", 2) end
  local scale = want:norm():item()
  return (got - want):norm():item() / (scale > 0 and scale or 1)
end

local rows = {}
local function compare(case, options)
  local want = moe.load_safetensors(golden .. "/" .. case .. "/expected.safetensors")
  local model = moe.load_hf(golden .. "/" .. case, options)
  local ids, row = want.ids, { case = case }
  rows[#rows + 1] = row
  row.logits = relative(model:logits(ids), want.logits, "logits")
  row.loss = math.abs(model:loss(ids):item() - want.loss:item())
  local grads, count, worst = model:grads(ids), 0, 0
  for name, g in pairs(want) do
    local parameter = name:match("^grad%.(.*)$")
    if parameter then
      if not grads[parameter] then error("no gradient of " .. parameter) end
      local d = relative(grads[parameter], g, parameter)
      if d > worst then worst, row.parameter = d, parameter end
      count = count + 1
    end
  end
  local ours = 0
  for _ in pairs(grads) do ours = ours + 1 end
  row.gradient, row.gradients = worst, count
  check.equal(ours, count, "number of gradients")
  check.is(count > 20, "hardly any gradients")
  check.is(row.logits <= LOGITS, ("logits: %.2e"):format(row.logits))
  check.is(row.loss <= LOSS, ("loss: %.2e"):format(row.loss))
  check.is(worst <= GRADIENT, ("gradient of %s: %.2e"):format(row.parameter, worst))
end

for _, case in ipairs { "q_lora", "plain_q", "yarn", "groups", "softmax", "softmax_groups", "two_shared", "norm_off", "norm_eps", "rope_halves", "bf16", "sharded", "stacked", "old_spelling", "tied" } do
  check.test("parity with transformers: " .. case, function() compare(case, { dtype = "fp32" }) end)
end
io.stdout:flush()
print(moe.table(rows, { columns = { "case", "logits", "loss", "gradient", "parameter", "gradients" }, titles = { case = "case", logits = "logits", loss = "loss", gradient = "worst gradient", parameter = "of", gradients = "compared" },
  formats = { logits = "%.1e", loss = "%.1e", gradient = "%.1e" } }))
check.done()

-- moe.gradcheck(f, inputs, options): gradients against finite differences.
local function gradcheck(f, inputs, options)
  options = moe.check_keys(options or {}, { "eps", "atol", "rtol" }, "moe.gradcheck: options")
  if type(inputs) ~= "table" then inputs = { inputs } end
  local eps, atol, rtol = options.eps or 1e-6, options.atol or 1e-5, options.rtol or 1e-3
  local x, weights, checked = {}, nil, {}
  for i, t in ipairs(inputs) do
    local is_tensor = type(t) == "userdata"
    x[i] = is_tensor and t:detach():contiguous():clone() or t
    if is_tensor and (t.dtype == "float64" or t.requires_grad) then
      if t.dtype ~= "float64" then moe.fail { kind = "dtype", op = ("moe.gradcheck: inputs[%d]"):format(i), got = t.dtype, want = "float64: differences of less precise numbers say little" } end
      checked[#checked + 1] = i
      x[i].requires_grad = true
    end
  end
  if #checked == 0 then moe.fail { op = "moe.gradcheck: inputs", got = "no float64 tensor", want = "at least one, to differentiate by" } end
  -- One number of all results: each weighted by draws of its own, so that no error cancels.
  local function value()
    local y = table.pack(f(table.unpack(x)))
    weights = weights or {}
    local sum
    for i = 1, y.n do
      weights[i] = weights[i] or moe.randn_like(y[i]:detach():double(), { generator = moe.generator(i) })
      local part = (y[i]:double() * weights[i]):sum()
      sum = sum and sum + part or part
    end
    return sum
  end
  local list = {}
  for i, at in ipairs(checked) do list[i] = x[at] end
  local grads = moe.grad(value(), list, { allow_unused = true })
  local worst = { error = 0, input = 0, element = 0, got = 0, want = 0, ok = true }
  moe.no_grad(function()
    for i, at in ipairs(checked) do
      local flat, g = x[at]:detach():view { -1 }, grads[i]:reshape { -1 }
      for e = 0, flat:numel() - 1 do
        local before = flat[e]:item()
        flat[e] = before + eps
        local above = value():item()
        flat[e] = before - eps
        local below = value():item()
        flat[e] = before
        local want, got = (above - below) / (2 * eps), g[e]:item()
        local error = math.abs(got - want)
        local fits = error <= atol + rtol * math.abs(want)
        if not fits and worst.ok or error > worst.error and fits == worst.ok then worst = { error = error, input = at, element = e, got = got, want = want, ok = fits } end
      end
    end
  end)
  if not worst.ok then
    moe.fail { kind = "state", op = ("moe.gradcheck: gradient of input %d, element %d"):format(worst.input, worst.element), got = ("%.9g"):format(worst.got), want = ("%.9g by differences"):format(worst.want) }
  end
  return true, worst.error
end

return moe.document(gradcheck, "moe.gradcheck",
  "moe.gradcheck(f, {inputs}, {eps = 1e-6, atol = 1e-5, rtol = 1e-3}): f's gradients against differences in each element of its float64 tensors. True and the largest error, or an error that\n"
  .. "names the element. f gives one or more tensors.\n"
  .. "Example: print(moe.gradcheck(function(a, b) return a:matmul(b):tanh() end, {moe.randn({2, 3}, {dtype = \"fp64\"}), moe.randn({3, 2}, {dtype = \"fp64\"})}))")

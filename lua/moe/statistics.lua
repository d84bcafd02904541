-- moe.statistics: means of a few repetitions, their spread, and how far to trust them.
local statistics = {}

local function numbers(values, op)
  if type(values) == "userdata" then values = values:to_table() end
  if type(values) ~= "table" or #values == 0 then moe.fail { op = op, got = type(values) == "table" and "no values" or type(values), want = "a list of numbers" } end
  for i, v in ipairs(values) do
    if type(v) ~= "number" then moe.fail { op = ("%s: value %d"):format(op, i), got = type(v), want = "a number" } end
  end
  return values
end

function statistics.mean(values)
  local sum = 0.0
  for _, v in ipairs(numbers(values, "moe.statistics.mean")) do sum = sum + v end
  return sum / #values
end

function statistics.std(values)
  values = numbers(values, "moe.statistics.std")
  if #values < 2 then return 0 / 0 end
  local mean, sum = statistics.mean(values), 0.0
  for _, v in ipairs(values) do sum = sum + (v - mean) ^ 2 end
  return math.sqrt(sum / (#values - 1))
end

function statistics.median(values)
  local sorted = table.move(numbers(values, "moe.statistics.median"), 1, #values, 1, {})
  table.sort(sorted)
  local n = #sorted
  return n % 2 == 1 and sorted[(n + 1) // 2] or (sorted[n // 2] + sorted[n // 2 + 1]) / 2
end

-- P(|T| < t) of Student's t with df degrees of freedom: finite sums in θ = atan(t / √df). Source: Abramowitz and Stegun 26.7.3, 26.7.4.
local function within(t, df)
  local angle = math.atan(t / math.sqrt(df))
  local s, c = math.sin(angle), math.cos(angle)
  local odd = df % 2 == 1
  if df == 1 then return 2 * angle / math.pi end
  local term, sum = odd and c or 1.0, odd and c or 1.0
  for k = odd and 3 or 2, df - 2, 2 do
    term = term * (k - 1) / k * c * c
    sum = sum + term
  end
  return odd and 2 / math.pi * (angle + s * sum) or s * sum
end

function statistics.student_t(confidence, df)
  if math.type(df) ~= "integer" or df < 1 then moe.fail { op = "moe.statistics.student_t: df", got = tostring(df), want = "an integer of 1 or more" } end
  if type(confidence) ~= "number" or not (confidence > 0 and confidence < 1) then
    moe.fail { op = "moe.statistics.student_t: confidence", got = tostring(confidence), want = "a number between 0 and 1, such as 0.95" }
  end
  local low, high = 0.0, 1.0
  while within(high, df) < confidence do low, high = high, 2 * high end
  for _ = 1, 100 do
    local middle = (low + high) / 2
    if middle == low or middle == high then break end
    if within(middle, df) < confidence then low = middle else high = middle end
  end
  return (low + high) / 2
end

function statistics.interval(values, confidence)
  local mean, n = statistics.mean(values), #values
  if n < 2 then return mean, 0 / 0 end
  return mean, statistics.student_t(confidence or 0.95, n - 1) * statistics.std(values) / math.sqrt(n)
end

-- nan - nan and inf - inf are nan.
function statistics.finite(values)
  if type(values) == "userdata" then values = values:to_table() end
  if type(values) ~= "table" then moe.fail { op = "moe.statistics.finite", got = type(values), want = "a list" } end
  local list = {}
  for _, v in ipairs(values) do
    if type(v) == "number" and v - v == 0 then list[#list + 1] = v end
  end
  return list
end

local TEXTS = {
  finite = "moe.statistics.finite(values): those that are numbers and neither nan nor infinite, in their order.\nExample: print(#moe.statistics.finite { 1, 0 / 0, 2 })",
  mean = "moe.statistics.mean(values): the arithmetic mean.\nExample: print(moe.statistics.mean { 1, 2, 6 })",
  std = "moe.statistics.std(values): standard deviation of a sample (divided by n − 1); nan of one value.\nExample: print(moe.statistics.std { 1, 2, 6 })",
  median = "moe.statistics.median(values): the middle value, or the mean of the two middle ones.\nExample: print(moe.statistics.median { 1, 2, 6 })",
  student_t = "moe.statistics.student_t(confidence, df): the t for which |T| < t with that probability, by Student's distribution with df degrees of freedom: 12.706 for (0.95, 1).\nExample: print(moe.statistics.student_t(0.95, 2))",
  interval = "moe.statistics.interval(values, confidence = 0.95): mean and half the width of its confidence interval by Student's t: mean ± half. Half is nan of one value.\nExample: print(moe.statistics.interval { 1, 2, 6 })",
}
for name, text in pairs(TEXTS) do moe.document(statistics[name], "moe.statistics." .. name, text) end
return moe.document(statistics, "moe.statistics", "moe.statistics: mean, spread and confidence of a few repetitions.")

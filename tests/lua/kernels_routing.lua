-- moe.kernels: from the router's choice to experts' rows and back, against plain loops over tables.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/kernels.lua")
local test, equal, near, is, raises, randn, shape, close, same = check.test, check.equal, check.near, check.is, check.raises, check.randn, check.shape, check.close, check.same
local k = moe.kernels
local nan = 0 / 0
local fp64, int32, int64 = { dtype = "fp64" }, { dtype = "int32" }, { dtype = "int64" }

test("kernels: route with groups equals a plain loop, and its bias moves the choice only", function()
  local T, E, K, G, keep = 9, 8, 2, 4, 2
  local logits, bias = randn(T, E), randn(E)
  local scores, weights, ids = k.route(logits, bias, { top_k = K, n_group = G, topk_group = keep, scale = 2.5, temperature = 0.5 })
  close(scores, (logits / 0.5):sigmoid())
  local s, b = scores:to_table(), bias:to_table()
  for t = 1, T do
    local groups = {}
    for g = 1, G do groups[g] = { g = g, best = s[t][2 * g - 1] + b[2 * g - 1] + s[t][2 * g] + b[2 * g] } end
    table.sort(groups, function(x, y) return x.best > y.best end)
    local experts = {}
    for i = 1, keep do for e = 2 * groups[i].g - 1, 2 * groups[i].g do experts[#experts + 1] = e end end
    table.sort(experts, function(x, y) return s[t][x] + b[x] > s[t][y] + b[y] end)
    local sum = s[t][experts[1]] + s[t][experts[2]]
    for i = 1, K do
      equal(ids[t - 1][i - 1]:item(), experts[i] - 1)
      near(weights[t - 1][i - 1]:item(), 2.5 * s[t][experts[i]] / sum, 1e-12)
    end
  end
  local soft, raw, given = k.route(logits, nil, { top_k = 1, softmax = true, norm_topk = false, ids = moe.full({ T, 1 }, 3) })
  close(soft, logits:softmax(1))
  same(raw:reshape { T }, soft:select(1, 3))
  equal(given:sum():item(), 3 * T)
  equal(shape((k.route(moe.zeros { 0, 4 }))), "[0, 4]")
end)

test("kernels: route refuses what does not fit, NaN is chosen and reaches the weights", function()
  local logits = randn(3, 8)
  raises("usage", function() return k.route(logits, nil, { top_k = 5, n_group = 4, topk_group = 2 }) end, "top_k", "at most the 4 experts of 2 groups")
  raises("usage", function() return k.route(logits, nil, { n_group = 3 }) end, "a divisor of 8")
  raises("usage", function() return k.route(logits, nil, { topk = 2 }) end, "topk", "top_k")
  raises("usage", function() return k.route(logits, nil, { temperature = 0 }) end)
  raises("dtype", function() return k.route(logits:to("bf16")) end, "bfloat16")
  raises("shape", function() return k.route(logits, randn(7)) end, "[7]", "[8]")
  raises("shape", function() return k.route(logits, nil, { ids = moe.full({ 3, 1 }, 8) }) end, "ids[0][0]", "[0, 8)")
  raises("shape", function() return k.route(logits, nil, { ids = moe.full({ 3, 2 }, 1) }) end)
  logits[1] = moe.tensor { 0, 0, 0, 0, 0, nan, 0, 0 }
  local _, weights, ids = k.route(logits, nil, { top_k = 2 })
  equal(ids[1][0]:item(), 5)
  is(weights[1][0]:item() ~= weights[1][0]:item() and weights[0]:is_finite() and weights[2]:is_finite())
end)

test("kernels: count_pairs by domain, padding apart, drops", function()
  local ids, kept = moe.tensor { { 0, 2 }, { 2, 1 }, { 2, 0 } }, moe.tensor { { 0, -1 }, { -1, 1 }, { -1, 0 } }
  local counts, dropped = moe.zeros({ 3, 3 }, int64), moe.zeros({ 3 }, int64)
  is(k.count_pairs(ids, moe.tensor({ 0, 1, -1 }, int32), counts, { kept = kept, dropped = dropped }) == counts, "counts is returned")
  same(counts, moe.tensor { { 1, 0, 1 }, { 1, 0, 1 }, { 0, 1, 1 } })
  same(dropped, moe.tensor { 0, 0, 2 })
  raises("shape", function() return k.count_pairs(ids, moe.tensor({ 0, 1, 2 }, int32), counts) end, "domain 2")
  raises("shape", function() return k.count_pairs(ids, moe.zeros({ 3 }, int32), counts, { kept = kept }) end, "dropped")
end)

test("kernels: sort_by_expert, permute and unpermute against loops, dropped pairs and padding included", function()
  local list = { { 1, 0 }, { 2, 1 }, { -1, 1 } }
  local x, weights, base = randn(3, 4), randn(3, 2), randn(3, 4)
  for _, align in ipairs { 1, 4 } do
    local plan = k.sort_by_expert(moe.tensor(list), 4, { align = align })
    local token, row, offsets = {}, {}, { 0 }
    for e = 0, 3 do
      for t = 1, 3 do
        for c = 1, 2 do
          if list[t][c] == e then
            token[#token + 1], row[#row + 1] = t - 1, { t, c }
          end
        end
      end
      while #token % align > 0 do token[#token + 1], row[#row + 1] = -1, false end
      offsets[#offsets + 1] = #token
    end
    equal(plan.rows, #token)
    equal(plan.align, align)
    same(plan.offsets, moe.tensor(offsets))
    same(plan.token, moe.tensor(token, int32))
    equal(plan.position[2][0]:item(), -1)
    local rows, row_weight = k.permute(x, weights, plan)
    local sum = base:clone()
    for r, from in ipairs(row) do
      same(rows[r - 1], from and x[from[1] - 1] or moe.zeros({ 4 }, fp64))
      equal(row_weight[r - 1]:item(), from and weights[from[1] - 1][from[2] - 1]:item() or 0.0)
      if from then sum[from[1] - 1] = sum[from[1] - 1] + rows[r - 1] end
    end
    close(k.unpermute(base, rows, plan), sum)
    close(k.unpermute(nil, rows, plan), sum - base)
  end
end)

test("kernels: a plan for no tokens, for one expert that takes all, and for nothing but drops; it cannot be changed from outside", function()
  local none = k.sort_by_expert(moe.zeros({ 0, 2 }, int64), 3)
  equal(none.rows, 0)
  equal(shape(k.permute(randn(0, 4), randn(0, 2), none)), "[0, 4]")
  local all = k.sort_by_expert(moe.full({ 5, 1 }, 2), 3)
  same(all.offsets, moe.tensor { 0, 0, 0, 5 })
  local dropped = k.sort_by_expert(moe.full({ 2, 2 }, -1), 3)
  equal(dropped.rows, 0)
  equal(k.unpermute(nil, randn(0, 4), dropped):abs():sum():item(), 0.0)
  local token = all.token
  token[0] = 99
  equal(all.token[0]:item(), 0)
  check.contains(tostring(all), "5 tokens x 1 choices")
  raises("usage", function() return all.tokens end, "token")
  raises("usage", function() return k.permute(randn(5, 4), randn(5, 1), { token = token }) end, "sort plan")
  raises("shape", function() return k.sort_by_expert(moe.full({ 1, 1 }, 3), 3) end, "ids[0][0]")
  raises("shape", function() return k.permute(randn(4, 4), randn(5, 1), all) end, "[4, 4]")
  raises("shape", function() return k.unpermute(nil, randn(4, 4), all) end)
  raises("dtype", function() return k.permute(randn(5, 4), moe.zeros({ 5, 1 }, { dtype = "bf16" }), all) end)
  raises("usage", function() return k.sort_by_expert(moe.full({ 5, 1 }, 2), 3, { align = 0 }) end)
  raises("usage", function() return k.sort_by_expert(moe.full({ 5, 1 }, 2), 3, { align = 1 << 62 }) end)
  all:free()
  raises("state", function() return k.permute(randn(5, 4), randn(5, 1), all) end, "freed")
end)

check.done()

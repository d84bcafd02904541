-- Traces and their analyses, each against a plain loop over the raw decisions.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises
local folder = check.folder()

local cfg = moe.config("cpu_quick"):with {
  ["model.num_layers"] = 3, ["model.mla.d_model"] = 32, ["model.moe.expert_intermediate_size"] = 16, ["model.dense_intermediate_size"] = 32,
  model = { moe = { num_experts = 8, num_experts_per_token = 3, n_group = 4, topk_group = 2 } },
  training = { global_batch_size = 2, micro_batch_size = 2, seq_length = 24, train_steps = 10 }, data = { synthetic = { domains = 3 } },
}
local model = moe.model(cfg, { dtype = "fp32" })
local layer
for i = 0, #model.routed_layers - 1 do layer = layer or model.routed_layers[i + 1] end
model:bias(layer):copy_(0.02 * moe.arange(0, 8))
local data = moe.data(cfg, { tokens = 240 })
local tr = model:trace(data)
local E, K = 8, 3

-- Decisions as plain lists: experts[t][k], weights[t][k], 1-based.
local function raw(t, l)
  return { experts = t:experts(l):to_table(), weights = t:weights(l):to_table(), ids = t:ids():to_table(), domain = t:domain():to_table(), position = t:position():to_table() }
end
local r = raw(tr, layer)

test("data: batches, an end, text, errors", function()
  local d = moe.data("synthetic", { tokens = 100, seq_length = 16, batch_size = 2, domains = 2 })
  local n, first = 0, nil
  for b in d:batches() do
    n, first = n + 1, first or b.ids
    equal(table.concat(b.ids.shape, "x"), "2x16")
  end
  equal(n, 4)
  equal(d:next(), nil)
  is(d:reset():next().ids:allclose(first))
  equal(#d.domains, 2)
  equal(d:decode(d:encode("tokens, ü")), "tokens, ü")
  equal(d.vocab_size, 264)
  moe.fs.mkdir(folder .. "/corpus/a")
  moe.fs.write(folder .. "/corpus/a/x.txt", ("some text. "):rep(50))
  local text = moe.data(folder .. "/corpus", { seq_length = 11, batch_size = 1 })
  check.contains(text:decode(text:next().ids), "text")
  raises("data", function() return moe.data "no/such/thing" end, "synthetic")
  raises("usage", function() return moe.data("synthetic", { tokns = 1 }) end, 'did you mean "tokens"?')
  raises("usage", function() return moe.data(3) end)
  raises("usage", function() return moe.data("synthetic"):batches() end, "tokens")
  raises("usage", function() return moe.data("synthetic", { batch_size = 0 }) end)
  raises("usage", function() return d:batches(1.5) end)
end)

test("trace: tokens, positions and weights are those of the model's decisions", function()
  equal(tr.num_tokens, 240)
  equal(#r.experts, 240)
  data:reset()
  local ids = {}
  for b in data:batches() do
    for _, id in ipairs(b.ids:reshape({ -1 }):to_table()) do ids[#ids + 1] = id end
  end
  for t = 1, 240 do
    equal(r.ids[t], ids[t])
    equal(r.position[t], (t - 1) % 24)
    local seen, sum = {}, 0
    for k = 1, K do
      is(not seen[r.experts[t][k]] and r.experts[t][k] < E)
      seen[r.experts[t][k]], sum = true, sum + r.weights[t][k]
    end
    near(sum, cfg.model.moe.routed_scaling_factor or 1, 5e-3)
  end
end)

test("trace: tokens come in whole batches, and print says so where that is more than was asked for", function()
  is(not tostring(tr):find("asked"), tostring(tr))
  local more = model:trace(data, { tokens = 100 })
  equal(more.num_tokens, 144)                         -- batches of 2 x 24
  check.contains(more, "trace: 144 tokens in whole batches (100 asked for), ")
  check.contains(model:trace(moe.data(cfg, { tokens = 50 })), "96 tokens in whole batches (50 asked for)")
  local run = moe.run { config = cfg, console = false, log = false }
  check.contains(run:trace { tokens = 1 }, "trace: 48 tokens in whole batches (1 asked for), ")
  is(not tostring(run:trace { batches = 1 }):find("asked"))
  check.contains(moe.data(cfg, { tokens = 50 }), "50 in all, rounded up to whole batches")
  is(not tostring(data):find("rounded"))
end)

test("trace: the special experts come first, those of few tokens not at all, and the table is whole", function()
  local all, some = tr:specialization { min_count = 0 }, tr:specialization { min_count = 20 }
  equal(#all, #tr.layers * E)
  local kept, num_domains = 0, 0
  for _, name in ipairs(tr.domains) do num_domains = num_domains + 1 end
  for _, s in ipairs(all) do
    local load, rates, sum = tr:load { layer = s.layer, by = "domain" }, {}, 0
    local tokens = load:to_tensor():select(1, s.expert):sum():item()
    equal(s.tokens, tokens)
    for d, name in ipairs(tr.domains) do
      local of_domain = load[d - 1]:sum():item()
      rates[name] = of_domain > 0 and load[d - 1][s.expert] / of_domain or 0
      sum = sum + rates[name]
    end
    near(s.rate, rates[s.domain], 1e-12)
    near(s.lift, sum > 0 and rates[s.domain] / sum * num_domains or 0, 1e-12)
    for _, rate in pairs(rates) do is(rate <= s.rate + 1e-12) end
    if tokens >= 20 then kept = kept + 1 end
  end
  equal(#some, kept)
  is(kept > 0 and kept <= #all)
  for i = 2, #all do is(all[i - 1].lift > all[i].lift or (all[i - 1].lift == all[i].lift and all[i - 1].tokens >= all[i].tokens)) end
  is(#tr:specialization() > 0)
  raises("usage", function() return tr:specialization { min_count = -1 } end, "0 or more")
  raises("usage", function() return tr:specialization { min_count = 1, layer = tr.layers[1] } end, "layer and min_count")
  local many = {}
  for i = 1, 30 do many[i] = { place = i } end
  local text = tostring(moe.records(many))
  equal(select(2, text:gsub("\n", "\n")), 22)
  is(text:find("\n   20\n… 10 more; :table%(%) is all of them$"), text)
  equal(select(2, tostring(moe.records(many):table()):gsub("\n", "\n")), 31)
end)

test("trace: load by domain and token, specialisation", function()
  local load, by_token, tokens = {}, {}, {}
  for d = 0, 2 do load[d], tokens[d] = {}, 0 end
  for t = 1, 240 do
    local d = r.domain[t]
    if d >= 0 then
      tokens[d] = tokens[d] + 1
      by_token[r.ids[t]] = by_token[r.ids[t]] or {}
      for k = 1, K do
        local e = r.experts[t][k]
        load[d][e] = (load[d][e] or 0) + 1
        by_token[r.ids[t]][e] = (by_token[r.ids[t]][e] or 0) + 1
      end
    end
  end
  local got = tr:load { layer = layer, by = "domain" }
  local share, relative = tr:specialization { layer = layer }, tr:specialization { layer = layer, relative = true }
  for d, name in ipairs(tr.domains) do
    for e = 0, E - 1 do
      equal(got:select("domain", name):select("expert", e), load[d - 1][e] or 0)
      if tokens[d - 1] > 0 then
        near(share[d - 1][e], (load[d - 1][e] or 0) / tokens[d - 1], 1e-12)
        near(relative[d - 1][e], (load[d - 1][e] or 0) / tokens[d - 1] / (K / E), 1e-12)
      end
    end
  end
  local id = r.ids[5]
  for n = 1, 240 do if r.domain[n] >= 0 then id = r.ids[n] break end end
  local token_load, found = tr:load { layer = layer, by = "token" }, 0
  equal(token_load:sum():item(), got:sum():item())
  for e = 0, E - 1 do found = found + (by_token[id][e] or 0) end
  for _, v in ipairs(tr:vocabulary { layer = layer, top = 300, min_count = 1 }) do
    if v.id == id then
      near(v.share, by_token[id][v.expert] / v.tokens, 1e-12)
      found = found - by_token[id][v.expert]
    end
  end
  equal(found, 0)
  near(tr:load({ layer = layer, relative = true }):mean():item(), 1, 1e-9)
  is(got:plot().svg:find("<rect"))
end)

test("trace: co-activation, flow and mean weights", function()
  local pairs_of, of, weight, next_layer = {}, {}, {}, raw(tr, tr.layers[2]).experts
  local to = {}
  for i = 0, E - 1 do pairs_of[i], to[i], of[i], weight[i] = {}, {}, 0, 0 end
  for t = 1, 240 do
    for k = 1, K do
      local i = r.experts[t][k]
      if r.domain[t] >= 0 then
        of[i], weight[i] = of[i] + 1, weight[i] + r.weights[t][k]
        for m = 1, K do
          local j, n = r.experts[t][m], next_layer[t][m]
          pairs_of[i][j], to[i][n] = (pairs_of[i][j] or 0) + 1, (to[i][n] or 0) + 1
        end
      end
    end
  end
  local c, f, w = tr:coactivation(layer), tr:flow(layer), tr:mean_weights():select("layer", layer)
  for i = 0, E - 1 do
    if of[i] > 0 then
      near(w[i], weight[i] / of[i], 1e-6)
      near(f[i]:sum():item(), K, 1e-9)
      near(c[i]:sum():item(), K - 1, 1e-9)
      for j = 0, E - 1 do
        near(c[i][j], i == j and 0 or (pairs_of[i][j] or 0) / of[i], 1e-12)
        near(f[i][j], (to[i][j] or 0) / of[i], 1e-12)
      end
    end
  end
  raises("config", function() return tr:coactivation(99) end, "routed")
  raises("usage", function() return tr:flow(tr.layers[#tr.layers]) end, "after it")
  raises("usage", function() return tr:coactivation("1") end)
end)

test("trace: statistics of load and decisions", function()
  local counts, groups, n = {}, 0, 0
  for e = 0, E - 1 do counts[e] = 0 end
  for t = 1, 240 do
    if r.domain[t] >= 0 then
      local hit = {}
      n = n + 1
      for k = 1, K do
        local e = r.experts[t][k]
        counts[e] = counts[e] + 1
        if not hit[e // 2] then hit[e // 2], groups = true, groups + 1 end
      end
    end
  end
  local s = tr:statistics()[1]
  equal(s.layer, layer)
  local mean, top, low, avg, entropy, square, dead = n * K / E, 0, math.huge, 0, 0, 0, 0
  for e = 0, E - 1 do
    local c = counts[e]
    top, low, avg, square, dead = math.max(top, c), math.min(low, c), avg + math.abs(c - mean) / mean / E, square + (c - mean) ^ 2 / E, dead + (c == 0 and 1 or 0)
    if c > 0 then entropy = entropy - c / (n * K) * math.log(c / (n * K)) end
  end
  near(s.max_vio, top / mean - 1, 1e-9)
  near(s.min_vio, low / mean - 1, 1e-9)
  near(s.avg_vio, avg, 1e-9)
  near(s.normalised_entropy, entropy / math.log(E), 1e-9)
  near(s.effective_experts, math.exp(entropy), 1e-9)
  near(s.variation, math.sqrt(square) / mean, 1e-9)
  equal(s.num_dead, dead)
  near(s.groups_hit, groups / n, 1e-12)
  is(s.groups_hit <= 2)
  is(s.token_entropy > 0 and s.token_entropy <= 1 and s.token_information >= 0 and s.gate_margin > 0)
  is(s.changed_by_bias > 0 and s.changed_by_bias < 1)
  near(s.domain_information, tr:mutual_information(layer), 1e-12)
  local margins, sum, m = tr:margin(layer):to_table(), 0, 0
  for t, v in ipairs(margins) do
    if v == v and r.domain[t] >= 0 then sum, m = sum + v, m + 1 end
  end
  near(s.gate_margin, sum / m, 1e-6)
  check.contains(tostring(tr:statistics()), "max_vio")
end)

-- Experts without a token in each run of `window` tokens that count, by a plain loop.
local function dead_by_hand(r, window)
  local out, met, left, n = {}, {}, E, 0
  for t = 1, #r.ids do
    if r.domain[t] >= 0 then
      for k = 1, K do
        local e = r.experts[t][k]
        if not met[e] then met[e], left = true, left - 1 end
      end
      n = n + 1
      if n % window == 0 then out[#out + 1], met, left = left, {}, E end
    end
  end
  return out, n
end

test("trace: dead experts over windows of tokens", function()
  local some = 0
  for _, window in ipairs { 1, 7, 50, 240 } do
    local want = dead_by_hand(r, window)
    local got, share = tr:dead { layer = layer, window = window }, tr:dead { layer = layer, window = window, relative = true }
    equal(got.shape[1], #want)
    for w, n in ipairs(want) do
      equal(got[w - 1], n)
      near(share[w - 1], n / E, 1e-12)
      some = some + n
    end
  end
  is(some > 0)
  local all = tr:dead { window = 50 }
  equal(all.shape[1], #tr.layers)
  equal(all:select("layer", layer)[2], tr:dead { layer = layer, window = 50 }[2])
  equal(tr:dead { window = 240 }:select("layer", layer)[0], tr:statistics()[1].num_dead)
  local spilled = model:trace(data, { memory = 1 })
  equal(tostring(spilled:dead { window = 50 }), tostring(all))
  raises("usage", function() return tr:dead {} end, "window")
  raises("usage", function() return tr:dead { window = 0 } end, "1 to 240")
  raises("usage", function() return tr:dead { window = 241 } end, "1 to 240")
  raises("config", function() return tr:dead { window = 5, layer = 0 } end, "routed")
end)

test("trace: the rate of dropped choices by layer, against the experts' loads over their capacity", function()
  local tight = cfg:with { model = { moe = { capacity_factor = 1.0, min_expert_capacity = 1 } } }
  local path = folder .. "/dropped"
  local t = moe.model(tight, { dtype = "fp32" }):trace(data)
  t:save(path)
  local capacity = math.ceil(24 * K / E)
  for i, l in ipairs(t.layers) do
    -- Of a sequence's tokens an expert takes `capacity`, whichever they are.
    local d, loads, over, n = raw(t, l), {}, 0, 0
    for token = 1, #d.ids do
      if d.position[token] == 0 then loads = {} end
      if d.domain[token] >= 0 then
        for k = 1, K do
          local e = d.experts[token][k]
          loads[e] = (loads[e] or 0) + 1
          n, over = n + 1, over + (loads[e] > capacity and 1 or 0)
        end
      end
    end
    is(over > 0)
    near(t:statistics()[i].drop_rate, over / n, 1e-12)
    equal(t:dropped(l):sum():item(), over)
    is(t:dropped(l):max():item() <= K)
    near(moe.trace(path):statistics()[i].drop_rate, over / n, 1e-12)
  end
  equal(tr:statistics()[1].drop_rate, 0)
  equal(tr:dropped(layer):sum():item(), 0)
end)

local ON_RANKS = "trace: of two ranks it is that of one, also of sequences that do not come out even, and saved once"
if check.has_ranks(ON_RANKS) then test(ON_RANKS, function()
  local script = folder .. "/ranks.lua"
  local out = assert(io.open(script, "w"))
  out:write(([[
    local cfg = moe.config("cpu_quick"):with { output_dir = %q, ["model.num_layers"] = 3, ["model.mla.d_model"] = 32, ["model.moe.expert_intermediate_size"] = 16, ["model.dense_intermediate_size"] = 32,
      model = { moe = { num_experts = 8, num_experts_per_token = 3, capacity_factor = 1.1 } }, data = { synthetic = { domains = 3 } }, distributed = { expert_parallel_size = tonumber(arg[1]) },
      training = { global_batch_size = 4, micro_batch_size = 1, seq_length = 24, train_steps = 5, use_fp64 = true } }
    local run = moe.run { config = cfg, console = false, log = false }
    local ids = moe.arange(0, 3 * 24):reshape { 3, 24 }
    for name, t in pairs { a = run.model:trace(moe.data(cfg, { batch_size = 3 }), { batches = 2 }), b = run.model:trace(ids), c = run.model:trace(moe.data(cfg), { tokens = 200, memory = 1, file = %q .. "/ranks.trace" }) } do
      local line = name .. " " .. t.num_tokens
      for _, what in ipairs { "ids", "domain", "position" } do line = line .. " " .. (t[what](t):to("int64") * (moe.arange(0, t.num_tokens) + 1)):sum():item() end
      for _, l in ipairs(t.layers) do
        line = line .. (" | %%d %%d %%d"):format(l, (t:experts(l) * (moe.arange(0, 3 * t.num_tokens):reshape { t.num_tokens, 3 } + 1)):sum():item(), t:dropped(l):sum():item())
      end
      print(line)
      t:save(%q .. "/saved." .. name)
      moe.trace(%q .. "/saved." .. name)
    end
  ]]):format(folder, folder, folder, folder))
  out:close()
  local function sorted(text)
    local lines = {}
    for line in text:gmatch("[^\n]+") do lines[#lines + 1] = line end
    table.sort(lines)
    return table.concat(lines, "\n")
  end
  local one, code = check.moelab("run '" .. script .. "' 1")
  equal(code, 0, one)
  is(#sorted(one) > 100, one)
  for _, ep in ipairs { 1, 2 } do
    local two, code = check.moelab(("run --ranks 2 '%s' %d"):format(script, ep))
    equal(code, 0, two)
    equal(sorted(two), sorted(one))
  end
  equal(moe.trace(folder .. "/ranks.trace").num_tokens >= 200, true)
end) end

test("trace: without a bias nothing is changed by it", function()
  local plain = moe.model(cfg, { dtype = "fp32" }):trace(moe.randint(0, 256, { 2, 12 }))
  equal(plain:statistics()[1].changed_by_bias, 0)
  equal(plain.num_tokens, 24)
  equal(plain.domains[1], "all")
end)

test("trace: more than memory goes to disk, is read back, and says the same", function()
  local path = folder .. "/t.trace"
  local streamed = model:trace(data, { memory = 4000, file = path })
  local hidden = model:trace(data, { memory = 1 })
  local read = moe.trace(path)
  is(read.is_complete)
  for _, other in ipairs { streamed, hidden, read } do
    equal(other.num_tokens, 240)
    is(other:experts(layer):allclose(tr:experts(layer)) and other:ids():allclose(tr:ids()) and other:weights(layer):allclose(tr:weights(layer)))
    is(other:load():to_tensor():allclose(tr:load():to_tensor()))
    equal(tostring(other:statistics()), tostring(tr:statistics()))
    equal(table.concat(other.layers, ","), table.concat(tr.layers, ","))
  end
  local bytes = moe.fs.read(path)
  is(select(2, bytes:gsub("CHNK", "")) > 2)
  local copy = tr:save(folder .. "/copy.trace")
  is(moe.trace(folder .. "/copy.trace"):experts(layer):allclose(copy:experts(layer)))
  is(#bytes < 240 * #tr.layers * 24 + 10000)
  moe.fs.write(folder .. "/torn.trace", bytes:sub(1, #bytes - 600))
  local torn = moe.trace(folder .. "/torn.trace")
  is(not torn.is_complete and torn.num_tokens < 240)
  moe.fs.write(folder .. "/flipped.trace", bytes:sub(1, 900) .. string.char(bytes:byte(901) ~ 1) .. bytes:sub(902))
  raises("data", function() return moe.trace(folder .. "/flipped.trace"):ids() end)
  moe.fs.write(folder .. "/other.trace", "no trace at all")
  raises("data", function() return moe.trace(folder .. "/other.trace") end, "another kind")
  raises("io", function() return moe.trace(folder .. "/none.trace") end)
  raises("io", function() return model:trace(data, { file = "/proc/none/x" }) end)
end)

test("trace: without weights", function()
  local bare = model:trace(data, { weights = false, batches = 2 })
  equal(bare.num_tokens, 96)
  is(bare:experts(layer):allclose(tr:experts(layer):narrow(0, 0, 96)))
  raises("state", function() return bare:weights(layer) end, "weights = true")
  raises("state", function() return bare:mean_weights() end)
  local s = bare:statistics()[1]
  is(s.max_vio == s.max_vio and s.gate_margin ~= s.gate_margin)
end)

test("trace: saturation and comparison of two models", function()
  local other_cfg = cfg:with { seed = 7 }
  local other = moe.model(other_cfg, { dtype = "fp32" }):trace(data)
  local same = tr:saturation(tr)
  equal(same:select("layer", layer), 1)
  local theirs, common, a, b = raw(other, layer).experts, 0, {}, {}
  for e = 0, E - 1 do a[e], b[e] = 0, 0 end
  local n = 0
  for t = 1, 240 do
    if r.domain[t] >= 0 then
      n = n + 1
      for k = 1, K do
        a[r.experts[t][k]], b[theirs[t][k]] = a[r.experts[t][k]] + 1, b[theirs[t][k]] + 1
        for m = 1, K do common = common + (r.experts[t][k] == theirs[t][m] and 1 or 0) end
      end
    end
  end
  near(tr:saturation(other)[0], common / (n * K), 1e-12)
  local js = 0
  for e = 0, E - 1 do
    local p, q = a[e] / (n * K), b[e] / (n * K)
    local m = (p + q) / 2
    js = js + (p > 0 and p * math.log(p / m) / 2 or 0) + (q > 0 and q * math.log(q / m) / 2 or 0)
  end
  local row = tr:compare(other)[1]
  near(row.js_divergence, js, 1e-9)
  near(row.overlap, common / (n * K), 1e-12)
  near(tr:compare(tr)[1].js_divergence, 0, 1e-12)
  equal(#tr:saturation(other, layer), E)
  raises("data", function() return tr:saturation(model:trace(moe.randint(0, 256, { 1, 12 }))) end, "same tokens")
  raises("usage", function() return tr:saturation(3) end)
end)

test("lens: an expert's mean output through norm and head", function()
  local out = model:expert_outputs(data, { layer = layer })
  local counts = tr:load { layer = layer }
  for e = 0, E - 1 do equal(out.tokens[e]:item(), counts[e]) end
  -- One token of one expert by hand: gate, up and down of the layer are the model's parameters.
  local p, rows = model:parameters(), moe.lens(model, data, { layer = layer, top = 3 })
  equal(#rows, E)
  for _, row in ipairs(rows) do
    if row.tokens > 0 then
      is(#row.ids == 3 and row.norm > 0 and row.weighted_norm < row.norm * 1.01)
      near(row.norm, out.norm[row.expert]:item(), 1e-9)
    end
  end
  -- Experts whose down projection is twice as large put out twice as much, in the same direction.
  local name = ("model.layers.%d.mlp.experts.0.down_proj.weight"):format(layer)
  local before = p[name]:clone()
  model:set(name, before * 2)
  local again = model:expert_outputs(data, { layer = layer })
  model:set(name, before)
  if counts[0] > 0 then
    is(again.mean[0]:allclose(out.mean[0] * 2, { rtol = 1e-4, atol = 1e-6 }))
    near(again.norm[0]:item() / out.norm[0]:item(), 2, 1e-4)
  end
  raises("config", function() return model:expert_outputs(data, { layer = 0 }) end, "experts")
  raises("usage", function() return model:expert_outputs(data, { leyer = 0 }) end, "layer")
end)

test("trace: bad input is an error", function()
  raises("usage", function() return model:trace() end)
  raises("usage", function() return model:trace(data, { tokens = 0 }) end, "1 or more")
  raises("usage", function() return model:trace(data, { tokens = 1, batches = 1 }) end, "one of them")
  raises("usage", function() return model:trace(data, { memory = -1 }) end)
  raises("shape", function() return model:trace(moe.zeros { 1, 2, 3 }) end)
  raises("dtype", function() return model:trace(moe.zeros { 1, 4 }) end)
  raises("data", function() return model:trace(moe.full({ 1, 4 }, 9999, { dtype = "int64" })) end)
  raises("config", function() return tr:load { layer = 0 } end, "routed")
  raises("usage", function() return tr:load { by = "colour" } end)
  raises("config", function() return tr:tokens { layer = layer, expert = 99 } end, "0 … 7")
  raises("usage", function() return moe.trace(3) end)
  local gone = model:trace(data, { batches = 1 })
  gone:free()
  raises("state", function() return gone:load() end, "freed")
end)

check.done()

-- Right calls for fuzz.lua: what the examples of help texts and a few lines more give to bindings, to be made wrong in one place.
-- Loaded with what fuzz_values.lua makes values with, and ENDS_PROGRAM of bindings.lua.
local of = ...
local CONFIG, DTYPES, make, named, value, option_value, number, text = of.CONFIG, of.DTYPES, of.make, of.named, of.value, of.option_value, of.number, of.text
local rand, chance, pick = of.rand, of.chance, of.pick

local right = {}                  -- binding → list of {arguments, n =}

-- Code that calls what examples cannot: objects of a run. R run, M its model, T a trace, ids of the right shape.
local MORE = [[
R:train(1) R:evaluate { max_batches = 1 } R:counts { by = "domain" } R:trace { batches = 1 } R:set { learning_rate = 1e-3 } R:every(1, function() end) R:on("spike", function() end)
for _ in R:steps(1) do end
local saved = R:save("right") R:restore("right") moe.replay(R, { console = false, log = false, steps = 1 })
M:logits(ids) M:loss(ids) M:grads(ids) M:layer(1) M:bias(1) M:parameters() M:trace(D, { tokens = 32 }) M:expert_outputs(D, { layer = 1, tokens = 32 }) M:set("lm_head.weight", M:parameters()["lm_head.weight"]:clone())
local L = M.layers[1] L.attention:forward(x) L.experts:forward(x) L.shared_experts:forward(x) L.router:forward(x) L:forward(x) M.layers[0].feed_forward:forward(x)
local r = M.router
for _, h in ipairs { r:mask { layer = 1, expert = 1 }, r:override { layer = 1, top_k = 1 }, r:bias { layer = 1, offset = { 0.1, 0, 0, 0 } }, r:bias { layer = 1, set = 0.5 }, r:freeze { layer = 1 }, r:force { layer = 1, experts = { 0, 1 } },
  r:force { by_token = moe.arange(528):reshape({ 264, 2 }) % 2 }, r:ablate { layer = 1, expert = 2 }, r:swap { layer = 1, experts = { 0, 1 } }, r:duplicate { layer = 1, from = 0, to = 1 }, r:reinit { layer = 1, expert = 3 },
  r:hook("pre_topk", function(s) return s.scores end, { layer = 1 }), r:hook("post_topk", function(s) return s.ids, s.weights end) } do h:undo() end
T:load { layer = 1, by = "domain" } T:load { by = "token", layer = 1 } for _ in T:tokens { layer = 1, expert = 0, top = 3 } do end for _ in pairs(T:examples { layer = 1, expert = 0, count = 2, width = 4 } or {}) do end
T:specialization() T:coactivation(1) T:vocabulary { layer = 1, top = 2, min_count = 1 } T:mutual_information(1) T:mean_weights() T:saturation(T, 1) T:compare(T) T:experts(1) T:weights(1) T:margin(1) T:ids() T:domain() T:position()
D:decode(D:encode("experts")) D:next() D:reset() for _ in D:batches(1) do end
moe.lens(M, D, { layer = 1, tokens = 32, top = 2 })
moe.draw.decode(moe.draw.png({}, { width = 8, height = 8 })) moe.draw.data_uri("\255\0\0", 1, 1)
local c = moe.config "tiny" c:memory { ranks = 1 } c:num_steps { ranks = 1 } c:assign { "model.moe.num_experts=4" } c:with { ["model.moe.num_experts"] = 8 } c:validate { built = true }
local p = viz.line { { y = { 1, 2 } } } p:png { scale = 1 } viz.heatmap(moe.ones { 3, 4 }, { rows = { "a", "b", "c" }, min = 0, max = 2 }) viz.bars({ { y = { 1, 2 } } }, { categories = { "a", "b" } }) viz.histogram({ 1, 2, 3 }, { bins = 2 })
local a = moe.randn { 3, 4 } a:gather(1, moe.zeros({ 3, 1 }, { dtype = "int64" })) a:scatter(1, moe.zeros({ 3, 1 }, { dtype = "int64" }), moe.ones { 3, 1 }) a:index_select(0, moe.tensor { 0, 2 }) a:topk(2, 1) a:sort(1) a:narrow(0, 1, 2) a:split(2, 0)
a[moe.tensor { 0, 2 }] = 1 local _ = a["1:3"], a[moe.tensor { true, false, true }], a { 1, ":2" } a[{ 0, 1 }] = 2 a:chunk(2, 1) a:repeat_interleave(2, 0) a:roll(1, 0) a:flip { 0 } a:masked_fill(a:gt(0), 1) a:index_add(0, moe.tensor { 0, 1, 1 }, a)
]]

-- Variables of the kernels' examples, as in kernels.lua.
local function kernel_names()
  local k = moe.kernels
  local plan = k.sort_by_expert(moe.tensor { { 1, 0 }, { 1, 2 } }, 3)
  local q, _, scale = k.quantize_weight(moe.randn { 128, 256 })
  return { plan = plan, w = moe.randn { 2, 3, 4 }, g = moe.randn { 2, 3, 4 }, q = q, scale = scale, cache = { rows = k.make_cache_rows(1, 8, 4), block_table = moe.zeros({ 1, 1 }, { dtype = "int32" }), latent = 8, rope = 4 },
    rows = k.permute(moe.randn { 2, 8 }, moe.ones { 2, 2 }, plan), ids = moe.zeros({ 4, 2 }, { dtype = "int64" }), x = moe.ones { 2 } }
end

-- Runs code; notes what it gives to bindings, wherever they are called from. A hook sees the arguments of a C function as its temporaries.
local function record(code, env, by_function)
  local f, problem = load(code, code, "t", getmetatable(env) and env or setmetatable(env, { __index = _G }))
  if not f then return false, problem end
  debug.sethook(function()
    local b = by_function[debug.getinfo(2, "f").func]
    if not b or #(right[b.binding] or {}) > 3 then return end
    local args, i = { n = 0 }, b.first
    while true do
      local name, v = debug.getlocal(2, i)
      if not name then break end
      args.n = args.n + 1
      args[args.n] = v
      i = i + 1
    end
    right[b.binding] = right[b.binding] or {}
    table.insert(right[b.binding], args)
  end, "c")
  local ok, err = pcall(f)
  debug.sethook()
  return ok, err
end

local function record_all(list)
  local by_function = {}
  for _, b in ipairs(list) do
    if type(b.f) == "function" then by_function[b.f] = { binding = b, first = 1 } else by_function[getmetatable(b.f).__call] = { binding = b, first = 2 } end
  end
  local kernels = kernel_names()
  for _, b in ipairs(list) do
    local example = b.help:match("\nExample: ([^\n]*)") or (b.name:find("^moe%.kernels%.") and b.help:gsub("\n  moe%.kernels%..*$", ""):match("([^\n]+)$"))
    if example and not of.ENDS_PROGRAM[b.name] then record(example, setmetatable({}, { __index = setmetatable(kernels, { __index = _G }) }), by_function) end
  end
  local run = moe.run { config = CONFIG, console = false, name = "right" }
  local ok, err = record(MORE, { R = run, M = run.model, T = make "trace", D = make "data", ids = moe.zeros({ 1, 8 }, { dtype = "int64" }), x = moe.randn { 4, 16 } }, by_function)
  if not ok then error("the lines of MORE in lib/fuzz_right.lua: " .. tostring(err), 0) end
end

-- The same argument, wrong in one place.
local function spoiled(v, b)
  if type(v) == "number" then return chance(0.5) and v + pick { -1, 1, 0.5, 1000, -1000 } or number() end
  if type(v) == "string" then return chance(0.5) and option_value(b) or v .. text() end
  if type(v) == "table" and not getmetatable(v) and next(v) ~= nil then
    local out, keys = {}, {}
    for key, inner in next, v do out[key] = inner keys[#keys + 1] = key end
    table.sort(keys, function(x, y) return tostring(x) < tostring(y) end)
    local key = pick(keys)
    out[key] = chance(0.7) and spoiled(out[key], b) or option_value(b)
    return out
  end
  if type(v) == "userdata" and v ~= moe.null and not io.type(v) then
    local ok, t = pcall(function()
      local n = rand(9)
      if n == 1 then return v:to(pick(DTYPES)) end
      if n == 2 then return v * -1 - 1 end
      if n == 3 then return v + 1000 end
      if n == 4 then return v:narrow(0, 0, math.max(0, v:size(0) - 1)) end
      if n == 5 then return moe.cat({ v, v }, rand(v:dim()) - 1) end
      if n == 6 then return v:transpose(0, -1) end
      if n == 7 then return v:unsqueeze(0) end
      if n == 8 then return v:reshape { -1 } end
      return v:narrow(-1, 0, 0)
    end)
    return ok and named(t, "<spoiled>") or value()
  end
  return value()
end

-- Tensors are copied: calls in place would spoil what is kept.
local function right_call(b)
  local given = pick(right[b])
  local args = { n = given.n }
  for i = 1, given.n do
    args[i] = given[i]
    local ok, copied = pcall(function() return given[i].clone and given[i]:clone() end)
    if type(given[i]) == "userdata" and ok and copied then args[i] = named(copied, "<right>") end
  end
  for _ = 1, pick { 0, 1, 1, 1, 2 } do
    local i = rand(math.max(args.n, 1))
    args[i] = spoiled(args[i], b)
    args.n = math.max(args.n, i)
  end
  return args
end

return { calls = right, record_all = record_all, call = right_call }

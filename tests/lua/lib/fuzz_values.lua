-- Arguments of fuzz.lua: plain values, tables, functions and objects of all types, freed and closed ones as well. Everything follows from the seed.
local values = {}

-- --- randomness of its own: calls may seed Lua's ---
local state = 1
local function bits()
  state = state ~ (state << 13)
  state = state ~ (state >> 7)
  state = state ~ (state << 17)
  return state
end
local function rand(n) return (bits() >> 11) % n + 1 end
local function chance(p) return (bits() >> 11) / 2 ^ 53 < p end
local function pick(list) return list[rand(#list)] end

function values.shuffle(list)
  for i = #list, 2, -1 do
    local k = rand(i)
    list[i], list[k] = list[k], list[i]
  end
end

-- --- errors that come from the arguments themselves ---
local MARK = "raised by the fuzz test"
local RAISED = { MARK }
function values.is_error(err)
  return type(err) == "table" and type(rawget(err, "kind")) == "string" and type(rawget(err, "op")) == "string" and type((getmetatable(err) or {}).__name) == "string"
end
-- What a function among the arguments raised may come out as it is; so may Lua's own "stack overflow" and yields outside of coroutines.
function values.is_own_error(err)
  if err == RAISED or err == nil then return true end
  if type(err) ~= "string" then return false end
  for _, text in ipairs { MARK, "stack overflow", "attempt to yield", "cannot resume", "error in error handling", "C stack overflow" } do
    if err:find(text, 1, true) then return true end
  end
  return false
end

-- --- names for what is printed of a call ---
local labels = setmetatable({}, { __mode = "k" })
local function named(value, label)
  if type(value) == "table" or type(value) == "function" or type(value) == "userdata" or type(value) == "thread" then labels[value] = labels[value] or label end
  return value
end

local function text_of(v, depth)
  local kind = type(v)
  if kind == "string" then return ("%q"):format(#v > 40 and v:sub(1, 37) .. "..." or v):gsub("\n", "n") .. (#v > 40 and "(#" .. #v .. ")" or "") end
  if kind == "number" then return math.type(v) == "integer" and ("%d"):format(v) or ("%.17g"):format(v) end
  if kind == "nil" or kind == "boolean" then return tostring(v) end
  if labels[v] then return labels[v] end
  if kind ~= "table" then return "<" .. kind .. ">" end
  if depth > 2 then return "{…}" end
  local parts = {}
  for key, inner in next, v do
    if #parts == 6 then parts[7] = "…" break end
    parts[#parts + 1] = (type(key) == "string" and key or "[" .. text_of(key, depth + 1) .. "]") .. " = " .. text_of(inner, depth + 1)
  end
  return "{" .. table.concat(parts, ", ") .. "}"
end
function values.describe(args)
  local parts = {}
  for i = 1, args.n do parts[i] = text_of(args[i], 0) end
  return "(" .. table.concat(parts, ", ") .. ")"
end

-- --- plain values ---
local NUMBERS = { 0, 1, 2, 3, 4, 7, 16, 64, 100, -1, -2, -3, -100, 0.0, 0.5, 1.5, -0.25, 1e-3, 1e30, -1e30, 2 ^ 31, 2 ^ 53, 2 ^ 62, 2 ^ 63, math.maxinteger, math.mininteger, 1 << 40, -(1 << 40), 0 / 0, 1 / 0, -1 / 0, 5e-324 }
local STRINGS = { "", "a", "x.npy", "y.npz", "z.safetensors", "picture.png", "picture.svg", "t.csv", "t.json", "t.md", "broken.npy", "broken.npz", "broken.safetensors", "good.npy", "good.npz", "good.safetensors", "good.trace", "folder/file",
  "no\0tail", ("long "):rep(3000), "\xff\xfe\x80", "mean", "cpu", "cuda", "cuda:7", "bf16", "fp64", "int64", "float32", "bool", "1:3", "…", "::2", "0:99", "ij,jk->ik", "ij->ji", "layer", "expert", "token", "domain", "loss", "step",
  "last", "tiny", "synthetic", "model.moe.num_experts", "training.learning_rate", "return 1", "{\"a\": 1}", "[[[[", "1e999", ("["):rep(200000) .. ("]"):rep(200000), ("{\"a\":"):rep(1000), "%d %s %n", "__index", "__gc", "kind", "µ §", "nan" }

local function number()
  if chance(0.7) then return NUMBERS[rand(16)] end
  return pick(NUMBERS)
end
local function text() return pick(STRINGS) end

-- --- objects ---
local types = {}                  -- type → {make = function, most = calls before it is made again}
local objects, uses = {}, {}
local kept = {}                   -- what calls gave
local freed = {}
local CANNOT = {                  -- types that have no object here, and why
  ["autograd host"] = "is not given to scripts",
}
if #moe.gpus() == 0 then
  CANNOT["cuda kernel"] = "no GPU"
  CANNOT["cuda stream"] = "no GPU"
end
function values.makes(name) return types[name] ~= nil or CANNOT[name] ~= nil end

local CONFIG = {
  output_dir = "runs", experiment_name = "fuzz", deterministic = true,
  model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 16,
    mla = { d_model = 16, d_latent = 8, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 8, num_shared_experts = 1, bias_update_speed = 0.01 } },
  training = { global_batch_size = 2, micro_batch_size = 2, seq_length = 16, train_steps = 6, learning_rate = 3e-3 },
  data = { dataset_type = "synthetic", synthetic = { domains = 2 } },
  validation = { enabled = false, max_batches = 1 }, checkpointing = { save_on_exit = false },
}

-- Functions that allocate nothing large may ask for one of these; makers of objects take nothing else.
local SHAPES = { {}, { 0 }, { 1 }, { 3 }, { 4 }, { 2, 3 }, { 3, 2 }, { 4, 4 }, { 0, 2 }, { 2, 0, 3 }, { 2, 3, 4 }, { 1, 1, 1, 1 }, { 2, 1, 2, 1, 2 }, { 1, 16 }, { 2, 16 }, { 64 }, { 16, 16 } }
local DTYPES = { "fp32", "fp32", "fp64", "bf16", "fp16", "int64", "int32", "bool", "uint8" }
local function tensor()
  local shape, dtype = pick(SHAPES), pick(DTYPES)
  local whole = dtype:find("int") or dtype == "bool"
  local t = whole and moe.randint(dtype == "bool" and 0 or chance(0.2) and -300 or 0, dtype == "bool" and 2 or chance(0.2) and 300 or 4, shape):to(dtype) or moe.randn(shape):to(dtype)
  local label = ("%s[%s]"):format(dtype, table.concat(shape, "x"))
  local how = rand(12)
  if how == 1 and #shape > 1 then t, label = t:transpose(0, 1), label .. ".T"
  elseif how == 2 and not whole then t.requires_grad = true label = label .. " grad"
  elseif how == 3 and not whole then t, label = t * (0 / 0), label .. " nan"
  elseif how == 4 and not whole and #shape > 0 then t.requires_grad = true t, label = (t * 2):sum(), label .. " sum of a leaf"
  elseif how == 5 and #shape == 1 then t, label = t:reshape({ 1, -1 }):expand({ 3, shape[1] }), label .. " expanded"
  elseif how == 6 and #shape > 0 and shape[1] > 1 then t, label = t:narrow(0, 1, 1), label .. " narrowed" end
  return named(t, "<" .. label .. ">")
end

local function make(name)
  if name == "tensor" then return tensor() end
  local t = types[name]
  if not objects[name] or uses[name] > t.most then
    local ok, value = pcall(t.make)
    if not ok then                                  -- of what was freed meanwhile
      objects = {}
      ok, value = pcall(t.make)
    end
    if not ok then error(("no object of type %s could be made: %s"):format(name, tostring(value)), 0) end
    objects[name], uses[name] = named(value, "<" .. name .. ">"), 0
  end
  uses[name] = uses[name] + 1
  return objects[name]
end

local function type_of(name, most, f) types[name] = { make = f, most = most } end
type_of("tensor", 0, tensor)
type_of("generator", 30, function() return moe.generator(rand(9)) end)
type_of("operator", 50, function()
  return moe.autograd { name = "twice", forward = function(ctx, x) ctx:save(x) return x * 2 end, backward = function(_, g) return g * 2 end }
end)
type_of("sort plan", 50, function() return moe.kernels.sort_by_expert(moe.tensor { { 0, 1 }, { 1, 2 } }, 3) end)
type_of("config", 100, function() return chance(0.5) and moe.config "tiny" or moe.config(CONFIG) end)
type_of("config section", 100, function() return moe.config(CONFIG).model end)
type_of("run", 120, function() return moe.run { config = CONFIG, console = false, log = chance(0.5), name = "fuzz" } end)
type_of("model", 200, function() return chance(0.5) and make "run".model or moe.model(CONFIG) end)
type_of("layers", 100, function() return make "model".layers end)
type_of("layer", 20, function() return make "model".layers[rand(2) - 1] end)
type_of("part of a layer", 10, function() return pick { function(l) return l.attention end, function(l) return l.experts end, function(l) return l.shared_experts end }(make "model".layers[1]) end)
type_of("router", 10, function() return chance(0.7) and make "run".model.router or make "model".layers[1].router end)
type_of("intervention", 10, function() return make "run".model.router:override { top_k = 1 } end)
type_of("callback", 5, function() return make "run":every(1, function() end) end)
type_of("job", 25, function()
  local run = moe.run { config = CONFIG, console = false, log = false }
  local job = run:start(chance(0.5) and 2 or 40)
  if chance(0.5) then job:wait() end
  return job
end)
type_of("data", 60, function() return moe.data("synthetic", { tokens = 64, seq_length = 16, batch_size = 2 }) end)
type_of("trace", 150, function() return moe.model(CONFIG):trace(moe.data("synthetic", { tokens = 64, seq_length = 16, batch_size = 2 })) end)
type_of("process", 20, function() return moe.spawn { "true" } end)
type_of("table", 30, function() return moe.table { { a = 1, b = "x" }, { a = 2.5, b = "y" }, { a = 0 / 0 } } end)
type_of("groups", 30, function() return make "table":group "b" end)
type_of("array", 30, function() return moe.array({ { 1, 2 }, { 3, 4 } }, { dims = { "layer", "expert" }, labels = { layer = { 1, "two" } } }) end)
type_of("plot", 30, function() return viz.line { { y = { 1, 2, 4 } } } end)
type_of("progress", 30, function() return moe.progress(3) end)
type_of("sweep", 60, function()
  return moe.sweep { name = "s" .. rand(3), base = CONFIG, output_dir = "sweeps", grid = { seed = { 1, 2 } }, fn = function() return { loss = 1.5 } end }
end)
if not CANNOT["cuda stream"] then type_of("cuda stream", 50, function() return moe.cuda.stream() end) end
if not CANNOT["cuda kernel"] then
  type_of("cuda kernel", 100, function() return moe.cuda.compile [[ extern "C" __global__ void twice(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] *= 2; } ]] end)
end

local names = {}
for name in pairs(types) do names[#names + 1] = name end

local function object()
  if #kept > 0 and chance(0.2) then return pick(kept) end
  if chance(0.12) then return pick(freed) end
  return make(pick(names))
end

-- --- tables, functions, others ---
local bindings_list = {}
local value                       -- any

local function ints()
  local t = {}
  for i = 1, rand(4) - 1 do t[i] = chance(0.9) and rand(5) - 2 or number() end
  return t
end

local function copy(t)
  local out = {}
  for key, inner in pairs(t) do out[key] = type(inner) == "table" and copy(inner) or inner end
  return out
end

local function nested(depth)
  local t = {}
  for _ = 1, depth do t = { t } end
  return named(t, "<nested " .. depth .. ">")
end

local ODD_METAS = {
  { __index = function() error(MARK) end }, { __len = function() return -1 end }, { __pairs = function() error(MARK) end }, { __tostring = function() return 3 end },
  { __tostring = function(s) return tostring(s) end }, { __name = 7 }, { __call = function() return 1 end }, { __methods = 3 }, { __keys = { 1, 2 } }, { __len = function() return "x" end }, { __index = function() return {} end },
  { __methods = { f = function() end } }, { __metatable = false },
}

local TABLES = {
  function() return {} end, ints, ints, function() return { 2, 3 } end,
  function() return { tensor(), tensor() } end, function() return { number(), text() } end, function() return { { 1, 2 }, { 3, 4 } } end, function() return { { 1, 2 }, { 3 } } end,
  function() local t = { 1 } t[2], t.me = t, t return named(t, "<holds itself>") end, function() local t = {} t[1] = t return named(t, "<only itself>") end, function() return nested(5) end, function() return nested(300) end, function() return nested(20000) end,
  function() return { value(2), value(2), value(2) } end, function() return { [text()] = value(2), [rand(5) - 2.5] = value(2) ~= nil } end, function() return { a = tensor(), b = tensor() } end,
  function() return { { a = 1, b = 2 }, { a = 3 } } end, function() return { y = { 1, 2, 0 / 0 }, x = { 1, 2, 3 } } end, function() return { { y = ints(), name = text() } } end,
  function() return named(setmetatable({ 1, 2, a = 3 }, pick(ODD_METAS)), "<odd metatable>") end, function() return { [1] = 1, [3] = 3, [1 << 60] = 1 } end, function() return named(copy(CONFIG), "<the small configuration>") end,
  function() return { model = { moe = { num_experts = number() } }, training = { learning_rate = number() } } end, function() return { "true", text() } end, function() return { object(), object() } end,
}

local FUNCTIONS = {
  function() return function() end, "<returns nothing>" end,
  function() local v = value(2) return function() return v, v end, "<returns " .. text_of(v, 1) .. ">" end,
  function() return function(...) return ... end, "<returns its arguments>" end,
  function() return function() error(MARK) end, "<raises a text>" end,
  function() return function() error(RAISED) end, "<raises a table>" end,
  function() return function() error() end, "<raises nil>" end,
  function() return function() return tensor() end, "<returns a tensor>" end,
  function() return function(x) if type(x) == "userdata" then x:free() end return x end, "<frees its argument>" end,
  function() local function f() return 1 + f() end return f, "<recurses for ever>" end,
  function() return function() coroutine.yield(1) return 1 end, "<yields>" end,
  function() return coroutine.wrap(function() coroutine.yield(2) error(MARK) end), "<wrapped coroutine>" end,
  function()
    local b, v = pick(bindings_list), value(2)
    while values.is_long(b.name) do b = pick(bindings_list) end
    return function() pcall(b.f, v) return v end, "<calls " .. b.name .. ">"
  end,
  function() return function(a) if type(a) == "number" then return a < 3 end return true end, "<a rule>" end,
}
local function func()
  local f, label = pick(FUNCTIONS)()
  return named(f, label)
end

local function other()
  local n = rand(6)
  if n == 1 then return named(io.tmpfile(), "<a file>") end
  if n == 2 then local f = io.tmpfile() f:close() return named(f, "<a closed file>") end
  if n == 3 then return named(coroutine.create(function() coroutine.yield(value(2)) end), "<coroutine>") end
  if n == 4 then local co = coroutine.create(function() end) coroutine.resume(co) return named(co, "<dead coroutine>") end
  if n == 5 then return named(select(2, pcall(moe.fail, { op = "fuzz" })), "<an error object>") end
  return moe.null
end

function value(depth)
  depth = depth or 0
  local n = rand(100)
  if n <= 24 then return number() end
  if n <= 36 then return text() end
  if n <= 41 then return chance(0.5) end
  if n <= 46 then return nil end
  if n <= 66 then return tensor() end
  if n <= 76 or depth > 1 then return object() end
  if n <= 90 then return pick(TABLES)() end
  if n <= 97 then return func() end
  return other()
end

-- Keys and texts that a help text names: options by their right names. Paths in examples are left out.
local hints = setmetatable({}, { __mode = "k" })
local function hints_of(b)
  if not hints[b] then
    local keys, texts = {}, {}
    for key in b.help:gmatch("([%a_][%w_]*) ?=") do keys[#keys + 1] = key end
    for word in b.help:gmatch('"([^"\n]*)"') do
      if not word:find("[/~]") and not word:find("..", 1, true) and #word < 40 then texts[#texts + 1] = word end
    end
    hints[b] = { keys = keys, texts = texts }
  end
  return hints[b]
end

local function option_value(b)
  local h = hints_of(b)
  if #h.texts > 0 and chance(0.35) then return pick(h.texts) end
  return value(1)
end
local function options(b)
  local h, t = hints_of(b), {}
  if #h.keys == 0 then return pick(TABLES)() end
  for _ = 1, rand(3) do t[pick(h.keys)] = option_value(b) end
  if chance(0.2) then t[rand(3)] = value(1) end
  return t
end

-- --- right calls, to be made wrong in one place ---
local right = assert(loadfile((arg[0]:match("^(.*)/") or ".") .. "/lib/fuzz_right.lua")) {
  CONFIG = CONFIG, DTYPES = DTYPES, make = make, named = named, value = value, option_value = option_value, number = number, text = text, rand = rand, chance = chance, pick = pick,
  ENDS_PROGRAM = dofile((arg[0]:match("^(.*)/") or ".") .. "/lib/bindings.lua").ENDS_PROGRAM,
}

-- --- calls ---

-- Where a number says how long something takes, or how much is started, it is small; programs are `true`.
local LONG = { "moe.sleep", "run:train", "run:start", "run:steps", "moe.replay", "moe.bench", "moe.sweep", "sweep:run", "process:wait", "job:wait", "moe.wait_any", "moe.execute", "moe.cuda.time", "moe.profile", "moe.gradcheck", "model:generate", "run:trace", "model:trace", "run:eval", "moe.lens", "model:expert_outputs", "next step of run:steps" }
local STARTS = { ["moe.spawn"] = true, ["moe.execute"] = true }
function values.is_long(name)
  for _, part in ipairs(LONG) do
    if name:find(part, 1, true) == 1 then return true end
  end
  return STARTS[name] or name == "moe.become"
end
local function small(v, seen)
  if type(v) == "number" then return (v ~= v or v > 3) and 2 or v end
  if type(v) ~= "table" or getmetatable(v) or seen[v] or labels[v] then return v end
  seen[v] = true
  for key, inner in next, v do v[key] = small(inner, seen) end
  return v
end

local function merge(into, from)
  for key, inner in next, from do
    if type(inner) == "table" and type(into[key]) == "table" then merge(into[key], inner) else into[key] = inner end
  end
  return into
end
local function small_config(v)
  if v == "tiny" or (type(v) == "table" and not getmetatable(v) and not labels[v]) then return merge(copy(CONFIG), type(v) == "table" and v or {}) end
  return v
end

-- Function, arguments, and how it is written. Most calls of a method are of an object of its type.
function values.call(b)
  local args, n = {}, rand(6) - 1
  if b.field then n = chance(0.9) and 1 or n end
  for i = 1, n do
    if #hints_of(b).texts > 0 and chance(0.1) then args[i] = pick(hints_of(b).texts)
    elseif chance(0.15) then args[i] = options(b)
    else args[i] = value() end
  end
  args.n = n
  local is_right = right.calls[b] and chance(0.4)
  if is_right then args = right.call(b)
  elseif b.type and types[b.type] and chance(0.9) then
    args[1], args.n = chance(0.93) and make(b.type) or freed[b.type] or tensor(), math.max(n, 1)
  end
  if values.is_long(b.name) then
    for i = 1, args.n do args[i] = small(args[i], {}) end
  end
  -- Models are small: what is asked of a configuration is asked of the small one.
  if b.name == "moe.model" or b.name == "moe.replay" then args[1] = small_config(args[1])
  elseif b.name == "moe.run" and type(args[1]) == "table" and not getmetatable(args[1]) then args[1].config = small_config(args[1].config) end
  if b.name == "moe.bench_lua" and (args[1] == nil or (type(args[1]) == "table" and not getmetatable(args[1]))) then
    args[1], args.n = merge({ rounds = 1, calls = 5 }, type(args[1]) == "table" and args[1] or {}), math.max(args.n, 1)
    if type(args[1].steps or 0) == "number" then args[1].steps = 0 end
  end
  if b.name == "moe.sleep" and type(args[1]) == "number" then args[1] = math.min(args[1], 0.01) end
  if STARTS[b.name] and type(args[1]) == "table" and not getmetatable(args[1]) and #args[1] > 0 and type(args[1][1]) == "string" then args[1] = { "true", args[1][2] } end
  local is_object = type(args[1]) == "userdata" and args[1] ~= moe.null and not io.type(args[1])
  if b.field and is_object and chance(0.4) then
    -- The same through x.name, or an assignment to it.
    local key = b.name:match("[^.]+$")
    if chance(0.5) then return function(x) return x[key] end, { args[1], n = 1 }, "read " .. b.name .. " " end
    local v = value()
    return function(x, y) x[key] = y end, { args[1], v, n = 2 }, "write " .. b.name .. " "
  end
  if b.type and is_object and chance(0.1) then
    -- What Lua's syntax does with an object.
    local key, other_value = value(), value()
    local how = rand(6)
    local f = ({ function(x) return x[key] end, function(x) x[key] = other_value end, function(x) return #x end, function(x) return tostring(x) end, function(x) return x(other_value) end,
      function(x) return x .. "" end })[how]
    local strange = how >= 5 or how <= 3
    return function(x)
      local ok, err = pcall(f, x)
      if not ok and (values.is_error(err) or not strange) then error(err, 0) end            -- Lua's own "attempt to …" is the right answer to x() of what cannot be called
    end, { args[1], n = 1 }, ("%s of %s with %s, %s "):format(({ "[key]", "[key] =", "#", "tostring", "call", ".." })[how], b.type, text_of(key, 1), text_of(other_value, 1))
  end
  return b.f, args, b.name
end

function values.keep(results)
  for i = 2, math.min(results.n, 4) do
    local r = results[i]
    if type(r) == "userdata" and io.type(r) == nil then
      local ok, n = pcall(function() return r.numel and r:numel() or 0 end)
      if ok and type(n) == "number" and n < 1e5 then
        kept[#kept < 40 and #kept + 1 or rand(40)] = named(r, "<a result>")
      end
    end
  end
end

-- After a call: what it ended is made anew soon.
function values.used(b)
  if b.type and b.name:find(":free$") or b.name:find(":close$") or b.name:find(":kill$") or b.name:find(":stop$") or b.name:find(":__close$") or b.name:find(":__gc$") then
    if chance(0.6) then objects[b.type] = nil end
  end
end

function values.start(o)
  state = (o.seed * 0x9E3779B97F4A7C15 | 1) ~ 0x1234567
  for _ = 1, 10 do bits() end
  bindings_list = o.bindings
  table.sort(names)
  local place = o.folder and o.folder .. "/" or ""
  CONFIG.output_dir = place .. "runs"
  moe.fs.mkdir(place .. "folder")
  moe.fs.write(place .. "broken.npy", "\x93NUMPY\1\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999,), }")
  moe.fs.write(place .. "broken.npz", "PK\5\6" .. ("\xff"):rep(18))
  moe.fs.write(place .. "broken.safetensors", ("<I8"):pack(1 << 50) .. "{}")
  moe.save_npy(place .. "good.npy", moe.ones { 2, 2 })
  moe.save_npz(place .. "good.npz", { a = moe.ones { 2 } })
  moe.save_safetensors(place .. "good.safetensors", { a = moe.ones { 2 } })
  make "trace":save(place .. "good.trace")
  for _, name in ipairs(names) do
    local ok, x = pcall(types[name].make)
    if not ok then error(("no object of type %s could be made: %s"):format(name, tostring(x)), 0) end
    if type(x) == "userdata" then
      x:free()
      freed[#freed + 1] = named(x, "<a freed " .. name .. ">")
      freed[name] = x
    end
  end
  local closed = moe.run { config = CONFIG, console = false, log = false }
  closed:close()
  right.record_all(o.bindings)
  freed[#freed + 1] = named(closed, "<a closed run>")
  freed[#freed + 1] = named(closed.model, "<the model of a closed run>")
end

-- An object of a type, and one that was freed; nil where there is none.
function values.object(name) return types[name] and make(name) end
function values.freed(name) return freed[name] end

function values.stop()
  objects, kept = {}, {}
  collectgarbage()
end

return values

-- moe.kernels.x.reference: what each kernel computes, by plain formulas in float64 on the tensors' device. Arguments and options as the kernel's; where operators are differentiable, so are these.
local R = {}

local function wide(t) return t:double() end
local function opt(options, name, default)
  local value = options and options[name]
  if value == nil then return default end
  return value
end
local KEEP = { keepdim = true }

function R.rmsnorm(x, gamma, o)
  x = wide(x)
  return x / ((x * x):mean(-1, KEEP) + opt(o, "eps", 1e-6)):sqrt() * wide(gamma)
end

function R.layernorm(x, gamma, beta, o)
  x = wide(x)
  local d = x - x:mean(-1, KEEP)
  return d / ((d * d):mean(-1, KEEP) + opt(o, "eps", 1e-6)):sqrt() * wide(gamma) + wide(beta)
end

function R.swiglu(gate_up, row_weight)
  local gate, up = table.unpack(wide(gate_up):chunk(2, 1))
  local y = gate:silu() * up
  return row_weight and y * wide(row_weight):unsqueeze(1) or y
end

function R.linear(x, w) return wide(x):matmul(wide(w).T) end
R.linear_wide, R.linear_fp64 = R.linear, R.linear

-- Rows offsets[e] … offsets[e + 1] go through w[e].
function R.grouped_linear(x, groups, w)
  local is_plan = tostring(groups):find("^sort plan")
  local offsets = (is_plan and groups.offsets or groups):long():to_table()
  local parts = {}
  for e = 0, #w - 1 do parts[e + 1] = wide(x):narrow(0, offsets[e + 1], offsets[e + 2] - offsets[e + 1]):matmul(wide(w[e]).T) end
  local rows = x:size(0) - offsets[#offsets]
  if rows > 0 then parts[#parts + 1] = moe.zeros({ rows, w:size(1) }, { dtype = "fp64", device = x.device }) end
  return moe.cat(parts)
end

function R.embed(ids, w) return wide(w):index_select(0, ids) end

function R.head_loss(x, w, targets, o)
  local valid = targets:ge(0)
  local scores = wide(x):matmul(wide(w).T):log_softmax(1)
  local by_token = -(scores:gather(1, targets:clamp(0):unsqueeze(1)):squeeze(1)) * valid:double()
  return by_token:sum() * opt(o, "scale", 1), by_token
end

-- Scores, weights of the chosen, ids: the best groups by their best (or two best) biased scores, then the best experts in them.
function R.route(logits, bias, o)
  local T, E = logits:size(0), logits:size(1)
  local K, G, kept = opt(o, "top_k", 1), opt(o, "n_group", 1), opt(o, "topk_group", 1)
  local x = wide(logits) / opt(o, "temperature", 1)
  local scores = opt(o, "softmax", false) and x:softmax(1) or x:sigmoid()
  local ids = o and o.ids
  if not ids then
    local order = bias and scores + wide(bias) or scores
    if G > 1 then
      local grouped = order:reshape { T, G, E // G }
      local n = opt(o, "best_two", true) and math.min(2, E // G) or 1
      local best = (grouped:topk(n, 2)):sum(2)
      local _, groups = best:topk(kept, 1)
      local open = groups:one_hot(G):sum(1):unsqueeze(2):expand { T, G, E // G }:reshape { T, E }
      order = moe.where(open:gt(0), order, -math.huge)
    end
    local _, chosen = order:topk(K, 1)
    ids = chosen
  end
  local weights = scores:gather(1, ids)
  if opt(o, "norm_topk", true) then weights = weights / weights:sum(1, KEEP) end
  return scores, weights * opt(o, "scale", 1), ids
end

function R.permute(x, weights, plan)
  local token, choice = plan.token:long(), plan.choice:long()
  local real = token:ge(0)
  token = token:clamp(0)
  choice = moe.where(real, choice, 0)
  local rows = wide(x):index_select(0, token) * real:double():unsqueeze(1)
  local row_weights = wide(weights):index_select(0, token):gather(1, choice:unsqueeze(1)):squeeze(1) * real:double()
  return rows, row_weights
end

function R.unpermute(base, y, plan)
  local position = plan.position:long()
  local T, K = position:size(0), position:size(1)
  local out = base and wide(base) or moe.zeros({ T, y:size(1) }, { dtype = "fp64", device = y.device })
  for k = 0, K - 1 do
    local row = position:select(1, k)
    if y:size(0) > 0 then out = out + wide(y):index_select(0, row:clamp(0)) * row:ge(0):double():unsqueeze(1) end
  end
  return out
end

function R.sum_of_squares(x) return (wide(x) * wide(x)):sum() end

-- The optimizers' references give the new values and leave their arguments as they are.
function R.adamw(master, grad, m, v, o)
  local lr, beta1, beta2, decay = opt(o, "lr", 0), opt(o, "beta1", 0.9), opt(o, "beta2", 0.95), opt(o, "weight_decay", 0)
  local step, decoupled = opt(o, "step", 1), opt(o, "decoupled", true)
  local w, g = wide(master), wide(grad) * opt(o, "grad_scale", 1)
  if not decoupled then g = g + w * decay end
  local m1, v1 = wide(m) * beta1 + g * (1 - beta1), wide(v) * beta2 + g * g * (1 - beta2)
  local update = (m1 / (1 - beta1 ^ step)) / ((v1 / (1 - beta2 ^ step)):sqrt() + opt(o, "eps", 1e-8))
  return w * (decoupled and 1 - lr * decay or 1) - update * lr, m1, v1
end

function R.sgd(master, grad, buffer, o)
  local w, g = wide(master), wide(grad) * opt(o, "grad_scale", 1)
  g = g + w * opt(o, "weight_decay", 0)
  if buffer then g = wide(buffer) * opt(o, "momentum", 0) + g end
  return w - g * opt(o, "lr", 0), buffer and g or nil
end

-- Five steps of the quintic iteration towards the nearest matrix with singular values 1. Source: Jordan et al., Muon, 2024.
function R.newton_schulz(g)
  local x = wide(g)
  local tall = x:size(1) > x:size(2)
  if tall then x = x:transpose(1, 2) end
  x = x / x:norm({ 1, 2 }, KEEP)
  for _ = 1, 5 do
    local a = x:matmul(x:transpose(1, 2))
    x = x * 3.4445 + (a * -4.7750 + a:matmul(a) * 2.0315):matmul(x)
  end
  return tall and x:transpose(1, 2) or x
end

-- Scales of 1 x 128 (rows) or 128 x 128 (weights) blocks are the largest magnitude / 448; q in E4M3 holds the quotients.
function R.dequantize_rows(q, scale)
  local rows, columns = q:size(0), q:size(1)
  local by_column = wide(scale):narrow(1, 0, rows):repeat_interleave(128, 0):narrow(0, 0, columns)
  return wide(q:float()) * by_column.T
end

function R.dequantize_weight(q, scale)
  local out, columns = q:size(1), q:size(2)
  local s = wide(scale):reshape { q:size(0), -1, scale:size(-1) }
  return wide(q:float()) * s:repeat_interleave(128, 1):narrow(1, 0, out):repeat_interleave(128, 2):narrow(2, 0, columns)
end

function R.rope_table(positions, rope, o)
  assert(opt(o, "factor", 1) == 1, "moe.kernels.rope_table.reference: without YaRN only")
  local half = moe.arange(0, rope // 2):double()
  local angle = moe.arange(positions):double():outer(opt(o, "theta", 10000) ^ (half * (-2 / rope)))
  return angle:cos(), angle:sin()
end

local function rotated(x, cos, sin, interleaved)
  local a, b
  if interleaved then
    a, b = x { "…", "::2" }, x { "…", "1::2" }
  else
    a, b = table.unpack(x:chunk(2, -1))
  end
  local p, q = a * cos - b * sin, b * cos + a * sin
  if not interleaved then return moe.cat({ p, q }, -1) end
  return moe.stack({ p, q }, -1):flatten(-2, -1)
end

-- Causal attention of B sequences of S tokens; without dropout.
function R.mla_attention(q, kv, o)
  assert(opt(o, "p", 0) == 0, "moe.kernels.mla_attention.reference: without dropout only")
  local B, H, nope, rope, v = opt(o, "B", 1), o.H, o.nope, opt(o, "rope", 0), o.v
  local S, G = opt(o, "S", q:size(0) // B), opt(o, "G", o.H)
  local device = { device = q.device }
  local query, keys = wide(q):reshape { B, S, H, nope + rope }, wide(kv):reshape { B, S, G, nope + v }
  local k, value = keys { "…", (":%d"):format(nope) }, keys { "…", ("%d:"):format(nope) }
  local scores = moe.einsum("bihd,bjhd->bhij", query { "…", (":%d"):format(nope) }, k:repeat_interleave(H // G, 2))
  if rope > 0 then
    local cos, sin = wide(o.cos)[(":%d"):format(S)], wide(o.sin)[(":%d"):format(S)]
    local interleaved = opt(o, "interleaved", true)
    local qr = rotated(query { "…", ("%d:"):format(nope) }, cos:unsqueeze(1), sin:unsqueeze(1), interleaved)
    local kr = rotated(wide(o.k_rope):reshape { B, S, rope }, cos, sin, interleaved)
    scores = scores + moe.einsum("bihd,bjd->bhij", qr, kr)
  end
  local i, j = moe.arange(S, device):unsqueeze(1), moe.arange(S, device):unsqueeze(0)
  local seen = j:le(i)
  local window = opt(o, "window", 0)
  if window > 0 then seen = seen:logical_and((i - j):lt(window)) end
  seen = seen:expand { B, S, S }
  if o.doc_start then seen = seen:logical_and(j:ge(o.doc_start:long():reshape { B, S, 1 })) end
  local p = moe.where(seen:unsqueeze(1), scores * opt(o, "softmax_scale", 1), -math.huge):softmax(-1)
  return moe.einsum("bhij,bjhd->bihd", p, value:repeat_interleave(H // G, 2)):reshape { B * S, H * v }
end

local TEXTS = {
  adamw = "gives the new master, m and v", sgd = "gives the new master and buffer", rope_table = "without YaRN", mla_attention = "without dropout",
}
local named = {}                      -- a function that several kernels share is one of its own for each: a text belongs to one
for name, f in pairs(R) do
  if named[f] then
    R[name] = function(...) return f(...) end
  end
  named[f] = true
  local text = ("moe.kernels.%s.reference(…): as moe.kernels.%s, by a plain formula in float64%s."):format(name, name, TEXTS[name] and "; " .. TEXTS[name] or "")
  moe.document(R[name], ("moe.kernels.%s.reference"):format(name), text)
end
return moe.document(R, "moe.kernels_reference", "moe.kernels_reference: name → the plain formula behind moe.kernels.<name>.reference.")

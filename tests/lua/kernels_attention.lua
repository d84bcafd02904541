-- moe.kernels: attention and decoding over a cache against plain loops over tables.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/kernels.lua")
local test, equal, is, raises, randn, shape, close, same = check.test, check.equal, check.is, check.raises, check.randn, check.shape, check.close, check.same
local k = moe.kernels
local nan, inf = 0 / 0, math.huge
local fp64, int32, int64 = { dtype = "fp64" }, { dtype = "int32" }, { dtype = "int64" }

-- Causal attention by loops over tables; see(b, i, j): whether position i sees j. Heads of q share key heads in order.
local function attention(q, kv, k_rope, s)
  local rot = function(x, first, position)
    local out = {}
    for d = 1, first do out[d] = x[d] end
    for i = 1, s.rope / 2 do
      local angle = position * 10000 ^ (-2 * (i - 1) / s.rope)
      local a, b = x[first + 2 * i - 1], x[first + 2 * i]
      out[first + 2 * i - 1], out[first + 2 * i] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    end
    return out
  end
  local Q, KV, R, out, W = q:to_table(), kv:to_table(), k_rope and k_rope:to_table(), {}, s.nope + s.rope
  for b = 0, s.B - 1 do
    for i = 0, s.S - 1 do
      local line = {}
      for h = 0, s.H - 1 do
        local g, query = h * s.G // s.H, rot({ table.unpack(Q[b * s.S + i + 1], h * W + 1, (h + 1) * W) }, s.nope, i)
        local weights, sum, part = {}, 0, {}
        for j = 0, i do
          if s.see(b, i, j) then
            local key = { table.unpack(KV[b * s.S + j + 1], g * (s.nope + s.v) + 1, g * (s.nope + s.v) + s.nope) }
            for d = 1, s.rope do key[s.nope + d] = R[b * s.S + j + 1][d] end
            key = rot(key, s.nope, j)
            local score = 0
            for d = 1, W do score = score + query[d] * key[d] end
            weights[j] = math.exp(score * s.scale)
            sum = sum + weights[j]
          end
        end
        for d = 1, s.v do
          part[d] = 0
          for j, w in pairs(weights) do part[d] = part[d] + w / sum * KV[b * s.S + j + 1][g * (s.nope + s.v) + s.nope + d] end
          line[#line + 1] = part[d]
        end
      end
      out[#out + 1] = line
    end
  end
  return moe.tensor(out, fp64)
end

test("kernels: mla_attention with and without rotation, documents, a window, shared key heads", function()
  local s = { B = 2, S = 6, H = 4, G = 2, nope = 3, rope = 4, v = 5, scale = 0.4, see = function() return true end }
  local q, kv, k_rope = randn(12, 4 * 7), randn(12, 2 * 8), randn(12, 4)
  local cos, sin = k.rope_table(8, 4)
  local o = { B = 2, H = 4, G = 2, nope = 3, rope = 4, v = 5, softmax_scale = 0.4, k_rope = k_rope, cos = cos, sin = sin }
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.p = 0.3
  local dropped = k.mla_attention(q, kv, o)
  is((dropped - k.mla_attention(q, kv, (function() o.p = nil return o end)())):abs():max():item() > 1e-3, "nothing was dropped")
  local starts = { { 0, 0, 2, 2, 2, 5 }, { 0, 1, 1, 1, 1, 1 } }
  o.doc_start, s.see = moe.tensor(starts, int32), function(b, i, j) return j >= starts[b + 1][i + 1] end
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.window, s.see = 2, function(b, i, j) return j >= starts[b + 1][i + 1] and j > i - 2 end
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-11)
  o.p = 1e-9                                       -- the other path, which drops nothing here
  close(k.mla_attention(q, kv, o), attention(q, kv, k_rope, s), 1e-7)
  local plain = { B = 1, S = 12, H = 2, G = 2, nope = 3, rope = 0, v = 5, scale = 1, see = function() return true end }
  close(k.mla_attention(randn(12, 6) * 0 + q:narrow(1, 0, 6), kv, { H = 2, nope = 3, v = 5 }), attention(q:narrow(1, 0, 6), kv, nil, plain), 1e-11)
  equal(shape(k.mla_attention(randn(0, 6), randn(0, 16), { H = 2, nope = 3, v = 5 })), "[0, 10]")
end)

test("kernels: mla_attention refuses wrong operands on both paths", function()
  local q, kv, o = randn(6, 6), randn(6, 16), { H = 2, nope = 3, v = 5 }
  local function with(more)
    local all = {}
    for key, value in pairs(o) do all[key] = value end
    for key, value in pairs(more) do all[key] = value end
    return all
  end
  for _, p in ipairs { 0, 0.5 } do
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, B = 4 }) end, "[6, 6]")
    raises("shape", function() return k.mla_attention(q, randn(6, 15), with { p = p }) end, "[6, 15]")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, H = 0 }) end, "heads")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, rope = 2, nope = 1 }) end)
    raises("dtype", function() return k.mla_attention(q, kv:to("fp32"), with { p = p }) end)
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, window = -1 }) end, "window")
    raises("shape", function() return k.mla_attention(q, kv, with { p = p, doc_start = moe.full({ 1, 6 }, 3, int32) }) end, "doc_start[0][0]")
    raises("usage", function() return k.mla_attention(q, kv, with { p = p, head = 2 }) end, "head")
  end
  raises("shape", function() return k.rope_table(4, 3) end, "even")
  raises("config", function() return k.rope_table(4, 4, { theta = 1 }) end)
end)

test("kernels: decoding over an appended cache equals softmax over its rows, in both formats", function()
  local L, R, H, lengths = 128, 4, 3, { 70, 1, 0 }
  local table_of = { { 3, 0 }, { 1, 2 }, { 2, 2 } }
  local q_latent, q_rope = randn(3, 1, H, L), randn(3, 1, H, R)
  for _, format in ipairs { "plain", "fp8" } do
    local cache = { rows = k.make_cache_rows(4, L, R, { format = format, dtype = "fp64" }), block_table = moe.tensor(table_of, int32), latent = L, rope = R, format = format }
    equal(shape(cache.rows), format == "plain" and "[4, 64, 132]" or "[4, 64, 140]")
    local latents, ropes, sequence, position = {}, {}, {}, {}
    for b, n in ipairs(lengths) do
      for t = 0, n - 1 do
        latents[#latents + 1], ropes[#ropes + 1], sequence[#sequence + 1], position[#position + 1] = randn(L), randn(R):to("bf16"):to("fp64"), b - 1, t
      end
    end
    local latent, rope = moe.stack(latents), moe.stack(ropes)
    is(k.append_latent(cache, latent, rope, moe.tensor(sequence, int32), moe.tensor(position, int32)) == cache)
    if format == "plain" then
      same(cache.rows[0][5], moe.cat { latents[70], ropes[70] })
      same(cache.rows[3][63], moe.cat { latents[64], ropes[64] })
    end
    local out, lse = k.mla_decode(q_latent, q_rope, cache, moe.tensor(lengths, int32), 0.1)
    local first = 0
    for b, n in ipairs(lengths) do
      if n > 0 then
        local rows = latent:narrow(0, first, n)
        local scores = (q_latent[b - 1][0]:matmul(rows.T) + q_rope[b - 1][0]:matmul(rope:narrow(0, first, n).T)) * 0.1
        close(out[b - 1][0], scores:softmax(1):matmul(rows), format == "plain" and 1e-11 or 0.3, format)
        close(lse[b - 1][0], scores:exp():sum(1):log(), format == "plain" and 1e-11 or 0.3, format)
      else
        equal(out[b - 1]:abs():sum():item(), 0.0)
        equal(lse[b - 1][0][0]:item(), -inf)
      end
      first = first + n
    end
    -- A NaN in a token that is seen is not taken for a token that sees nothing.
    local one = moe.zeros({ 1 }, int32)
    k.append_latent(cache, moe.full({ 1, L }, nan, fp64), moe.zeros({ 1, R }, fp64), one, one)
    out = k.mla_decode(q_latent, q_rope, cache, moe.tensor(lengths, int32), 0.1)
    is(not out[0]:is_finite() and out[1]:is_finite(), "NaN in " .. format)
  end
end)

test("kernels: decoding refuses places outside the cache, other dtypes and formats", function()
  local cache = { rows = k.make_cache_rows(2, 8, 4), block_table = moe.tensor({ { 0, 5 } }, int32), latent = 8, rope = 4 }
  local q, r, one = moe.randn { 1, 1, 2, 8 }, moe.randn { 1, 1, 2, 4 }, moe.ones({ 1 }, int32)
  raises("shape", function() return k.mla_decode(q, r, cache, moe.full({ 1 }, 65, int32), 1) end, "block_table[0][1]", "5")
  raises("shape", function() return k.mla_decode(q, r, cache, moe.full({ 1 }, 129, int32), 1) end, "lengths[0]")
  raises("dtype", function() return k.mla_decode(q, r, cache, moe.ones({ 1 }, int64), 1) end, "int32")
  raises("dtype", function() return k.mla_decode(q:to("fp64"), r:to("fp64"), cache, one, 1) end)
  raises("usage", function() return k.mla_decode(q, r, cache, one, 0) end)
  raises("shape", function() return k.append_latent(cache, moe.zeros { 1, 8 }, moe.zeros { 1, 4 }, one, one) end, "sequence 1")
  raises("usage", function() return k.make_cache_rows(1, 8, 4, { format = "fp9" }) end, "fp8")
  raises("shape", function() return k.make_cache_rows(1, 8, 4, { format = "fp8" }) end, "multiple of 128")
  raises("usage", function() return k.mla_decode(q, r, { row = cache.rows }, one, 1) end, "rows")
  raises("shape", function() return k.mla_decode(q, r, { latent = 8, rope = 4 }, one, 1) end, "cache.rows")
end)

check.done()

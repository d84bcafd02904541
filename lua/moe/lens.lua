-- moe.lens(model, data, options): which tokens the experts of a layer push, by the model's own head.

-- The model's final norm and head on vectors [n, d_model]: logits [n, vocabulary], float64.
local function logits_of(model, vectors)
  local p = model:parameters()
  local x, weight = vectors:to("fp64"), p["model.norm.weight"]:to("fp64"):to("cpu")
  if p["model.norm.bias"] then
    x = x - x:mean(-1, { keepdim = true })
    x = x / ((x * x):mean(-1, { keepdim = true }) + model.config.model.norm_eps):sqrt() * weight + p["model.norm.bias"]:to("fp64"):to("cpu")
  else
    x = x / ((x * x):mean(-1, { keepdim = true }) + model.config.model.norm_eps):sqrt() * weight
  end
  local head = p["lm_head.weight"] or p["model.embed_tokens.weight"]
  return x:matmul(head:to("fp64"):to("cpu").T)
end

local function shown(data, id)
  local text = data:decode { id }
  if text == "" then return ("<%d>"):format(id) end
  return (text:gsub("[%c\128-\255]", function(c) return c == "\n" and "\\n" or c == "\t" and "\\t" or ("\\x%02X"):format(c:byte()) end):gsub("^ $", "␣"))
end

local function lens(model, source, options)
  options = moe.check_keys(options or {}, { "layer", "tokens", "batches", "top" }, "moe.lens: options")
  local data = type(source) == "userdata" and source or moe.data(source)
  local out = model:expert_outputs(data, { layer = options.layer, tokens = options.tokens, batches = options.batches })
  local logits = logits_of(model, out.mean)
  -- What all experts push alike says nothing about one of them.
  local counts = out.tokens:to_table()
  local used = {}
  for e, n in ipairs(counts) do
    if n > 0 then used[#used + 1] = logits[e - 1] end
  end
  local common = #used > 0 and moe.stack(used):mean(0)
  local norm, weighted, top, rows = out.norm:to_table(), out.weighted_norm:to_table(), options.top or 8, {}
  for e, n in ipairs(counts) do
    local row = { expert = e - 1, tokens = n, norm = norm[e], weighted_norm = weighted[e], ids = {}, pushes = "" }
    if n > 0 then
      local order, push, texts = {}, (logits[e - 1] - common):to_table(), {}
      for id = 1, #push do order[id] = id end
      table.sort(order, function(a, b) return push[a] > push[b] or (push[a] == push[b] and a < b) end)
      for i = 1, math.min(top, #order) do
        row.ids[i] = order[i] - 1
        texts[i] = shown(data, order[i] - 1)
      end
      row.pushes = table.concat(texts, " ")
    end
    rows[e] = row
  end
  return moe.records(rows, { "expert", "tokens", "norm", "weighted_norm", "pushes" }), logits
end

return moe.document(lens, "moe.lens",
  "moe.lens(model, data, {layer =, tokens =, batches =, top = 8}): the logit lens of a layer's experts: the final norm and the head on the mean output of each over the data's tokens, less the mean over experts: records {expert, tokens, norm (mean |E(x)|), weighted_norm (mean |w E(x)|), pushes (the tokens of "
  .. "the largest logits), ids}; second the logits themselves, [expert, vocabulary], whose means are not taken off.")

-- The small run that tests of interventions, control and layers share, and comparisons of weights bit for bit.
return function(check, folder)
  local SMALL = {
    output_dir = folder, experiment_name = "small", deterministic = true,
    model = { num_layers = 3, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64, init_method_std = 0.06,
      mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
      moe = { num_experts = 6, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1, bias_update_speed = 0.01 } },
    training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 32, train_steps = 40, learning_rate = 3e-3 },
    data = { dataset_type = "synthetic", synthetic = { domains = 3 } },
    validation = { enabled = false, max_batches = 2 },
    checkpointing = { save_on_exit = false },
  }
  local cfg = moe.config(SMALL)
  local function fresh(options)
    options = options or {}
    return moe.run { config = options.config or cfg, console = false, log = options.log or false, name = options.name }
  end
  local function weights(run)
    local list = {}
    for name, value in pairs(run.model:parameters()) do list[name] = value:clone() end
    for _, layer in ipairs(run.model.routed_layers) do
      local b = run.model:bias(layer)
      if b then list["bias " .. layer] = b:clone() end
    end
    return list
  end
  local function same(a, b)
    for name, value in pairs(a) do
      if not (b[name] and (value - b[name]):abs():max():item() == 0) then return false, name end
    end
    return true
  end
  local function must_equal(a, b)
    local ok, name = same(weights(a), weights(b))
    check.is(ok, "differs: " .. tostring(name))
  end
  local function counts(run, layer, expert) return run:counts()[layer][expert]:item() end
  return { cfg = cfg, fresh = fresh, weights = weights, same = same, must_equal = must_equal, counts = counts }
end

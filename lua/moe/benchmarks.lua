-- moe.benchmarks: the jobs that `moelab bench` measures.
-- What the peer's model has too.
local PLAIN = {
  model = { mla = { attn_dropout = 0 }, moe = { dropout = 0, router_noise_std = 0, capacity_factor = moe.null, use_aux_loss_free = true, router_aux_loss_weight = 0 } },
  training = { use_mtp = false },
}

local BENCHMARKS = {
  { name = "cpu_quick_train", config = "cpu_quick", batch = 16, seq = 256, about = "whole steps of the quick shape, 16 x 256 tokens" },
  { name = "train_16b_5l", config = "deepseek_v3_16b", set = { model = { num_layers = 5 }, training = { use_bf16 = true } }, batch = 4, seq = 4096, about = "whole steps of five layers of the 16B shape, 4 x 4096 tokens, bf16 products, fp32 master weights and moments" },
  { name = "gpu_tiny_train", config = "tiny", set = PLAIN, batch = 8, seq = 512, about = "whole steps of the tiny configuration without dropouts, noise, capacity and MTP, 8 x 512 tokens" },
  { name = "gpu_small_train", config = "small", set = PLAIN, batch = 8, seq = 2048, about = "the same of the small configuration, 8 x 2048 tokens" },
  { name = "cpu_tiny_train", config = "cpu_tiny", batch = 4, seq = 256, about = "whole steps of the tiny shape, 4 x 256 tokens" },
}

return moe.document(BENCHMARKS, "moe.benchmarks", "moe.benchmarks: the jobs of `moelab bench`: a list of {name, config, set (changes of it), batch (sequences), seq (tokens), about}.")

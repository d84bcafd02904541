-- moe.benchmarks: the jobs that `moelab bench` measures.
local BENCHMARKS = {
  { name = "cpu_quick_train", config = "cpu_quick", batch = 16, seq = 256, about = "whole steps of the quick shape, 16 x 256 tokens" },
  { name = "cpu_tiny_train", config = "cpu_tiny", batch = 4, seq = 256, about = "whole steps of the tiny shape, 4 x 256 tokens" },
}

return moe.document(BENCHMARKS, "moe.benchmarks", "moe.benchmarks: the jobs of `moelab bench`: a list of {name, config, batch (sequences), seq (tokens), about}.")

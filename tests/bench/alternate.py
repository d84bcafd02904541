"""moelab and Hugging Face's DeepseekV3 in turn, same machine, same sitting: training tokens/s at the quick or tiny CPU shape.

  python tests/bench/alternate.py path/to/moelab [quick|tiny] [rounds] [unlocked] [bf16]
unlocked: the peer's MKL, too, is told that the processor is Intel's (needs cc); on Intel it changes nothing.
bf16: both compute in bf16 (the peer by autocast) with weights in fp32; for processors with AMX or AVX-512 bf16.
Needs torch and transformers. The peer runs fp32 with fused AdamW and torch.compile, its experts once as a loop ("eager") and once
as grouped products; the faster one is the peer. One JSON line a figure; a round is one window of each.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
if "unlocked" in sys.argv and "LD_PRELOAD" not in os.environ:
    answer = os.path.join(tempfile.mkdtemp(), "answer.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", answer], input=b"int mkl_serv_intel_cpu_true(void) { return 1; }", check=True)
    KEEP["LD_PRELOAD"] = answer
if not KEEP.items() <= os.environ.items():        # the allocator reads them at start-up: about a tenth faster for the peer
    os.execve(sys.executable, [sys.executable] + sys.argv, {**os.environ, **KEEP})
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

SHAPES = {
    "quick": (16, 256, dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16, moe_intermediate_size=128, intermediate_size=704, vocab_size=264)),
    "tiny": (4, 256, dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, n_routed_experts=4, moe_intermediate_size=512, intermediate_size=1408, vocab_size=32000)),
}
SAME = dict(num_hidden_layers=4, first_k_dense_replace=1, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, kv_lora_rank=128, q_lora_rank=None, num_experts_per_tok=2,
            n_shared_experts=1, n_group=1, topk_group=1, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)


def peer(batch, seq, shape, experts):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**SAME, **shape), attn_implementation="sdpa", experts_implementation=experts).float().train()
    run = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        ids = torch.randint(0, shape["vocab_size"], (batch, seq))
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in sys.argv):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for _ in range(3):
        step()
    return step


def window(step, tokens, seconds=5):
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
        step()
        count += 1
    return count * tokens / (time.perf_counter() - start)


def main():
    program, name = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "quick"
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    torch.set_num_threads(2)
    batch, seq, shape = SHAPES[name]
    steps = {e: peer(batch, seq, shape, e) for e in ("eager", "grouped_mm")}
    own_env = {k: v for k, v in os.environ.items() if k not in KEEP}
    got = {f"hf_{e}": [] for e in steps} | {"moelab": []}
    for _ in range(rounds):
        for e, step in steps.items():
            got[f"hf_{e}"].append(window(step, batch * seq))
        out = subprocess.run([program, "--threads", "2", "bench", f"cpu_{name}_train", "--json", "--device", "cpu"] + (["dtype=bf16"] if "bf16" in sys.argv else []), env=own_env, capture_output=True, text=True, check=True).stdout
        got["moelab"].append(json.loads(out.strip().splitlines()[-1])["value"])
    best = max(statistics.median(v) for k, v in got.items() if k != "moelab")
    for k, v in got.items():
        print(json.dumps({"name": f"{k}_cpu_{name}_train", "value": round(statistics.median(v), 1), "unit": "tok/s", "all": [round(x) for x in v], "ratio_to_best_peer": round(statistics.median(v) / best, 2)}), flush=True)


main()

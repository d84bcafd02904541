"""Writes hf/<case>/: small random models of Hugging Face transformers, and what transformers computes with them.

Each folder has config.json and the weights as save_pretrained writes them, and expected.safetensors with
  ids              int64 [2, 23]   random tokens; the labels are the same ids (transformers shifts them)
  logits           fp32 [2, 23, vocabulary]
  loss             fp32 []         mean over the 2 x 22 shifted positions
  grad.<name>      fp32            gradient of the loss, one tensor a parameter; one a matrix and expert
  topk_ids.<layer> int64 [46, K]   chosen experts, ascending
All values are computed in float32 from the stored weights. Selections have a margin of at least MARGIN, so that rounding
elsewhere cannot change them. Made with torch 2.11.0 and transformers 5.17.0: python tests/golden/make_hf.py [case ...]
"""
import json
import logging
import os
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

MARGIN = 2e-3
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hf")
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=256, beta_fast=32, beta_slow=1, mscale=0.8, mscale_all_dim=0.6)
V3 = dict(vocab_size=61, hidden_size=32, intermediate_size=40, moe_intermediate_size=6, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4,
          num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.7,
          q_lora_rank=None, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=7, max_position_embeddings=64, num_nextn_predict_layers=0,
          rope_parameters=dict(rope_type="default", rope_theta=10000.0))
V2 = {k: v for k, v in V3.items() if k not in ("num_nextn_predict_layers", "n_group", "topk_group")} | dict(norm_topk_prob=False, topk_method="greedy")
SHORT = dict(num_hidden_layers=2)
# case: (changes of the config, options)
CASES = {
    "q_lora": (V3 | dict(q_lora_rank=18), {}),
    "plain_q": (V3, {}),
    "yarn": (V3 | SHORT | dict(q_lora_rank=18, rope_parameters=YARN, max_position_embeddings=1024), {}),
    # Biases around -1.5 make every biased score negative: masking the other groups with 0 instead of -inf would choose them.
    "groups": (V3 | dict(n_routed_experts=12, n_group=4, topk_group=2, moe_intermediate_size=5), dict(bias=(-1.5, 0.3))),
    # DeepseekV3 of transformers knows sigmoid only; DeepseekV2 is the same structure with softmax scores and no bias.
    "softmax": (V2, {}),
    "softmax_groups": (V2 | SHORT | dict(n_routed_experts=12, n_group=4, topk_group=2, topk_method="group_limited_greedy"), {}),
    "two_shared": (V3 | SHORT | dict(n_shared_experts=2), {}),
    "norm_off": (V3 | SHORT | dict(norm_topk_prob=False), {}),
    # Large, so that it shows which norms follow it: those of the latents do not.
    "norm_eps": (V3 | SHORT | dict(q_lora_rank=18, rms_norm_eps=1e-2), {}),
    "rope_halves": (V3 | SHORT | dict(rope_interleave=False), {}),
    "tied": (V3 | SHORT | dict(tie_word_embeddings=True), {}),
    "bf16": (V3 | SHORT | dict(q_lora_rank=18), dict(dtype=torch.bfloat16)),
    "sharded": (V3 | SHORT, dict(max_shard_size="24KB")),
    # Experts as transformers keeps them in memory: gate_up_proj [E, 2F, D] and down_proj [E, D, F].
    "stacked": (V3 | SHORT, dict(stacked=True)),
    # The spelling of DeepSeek's own files: rope_theta and rope_scaling, scoring_func, topk_method.
    "old_spelling": (V3 | SHORT | dict(rope_parameters=YARN, max_position_embeddings=1024), dict(old_spelling=True)),
}


def randomize(model, bias):
    """Weights of a size that makes attention, routing and every expert matter."""
    for name, p in model.named_parameters():
        scale = 0.5 if name.endswith("mlp.gate.weight") else (0.3 if model.config.tie_word_embeddings else 1.0) if "embed_tokens" in name else 1.2 * p.shape[-1] ** -0.5
        p.data.normal_(0, scale)
        if "norm" in name:
            p.data.mul_(0.2 / scale).add_(1)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.normal_(bias[0], bias[1])


def watch_routers(model):
    """Records per mixture layer the chosen experts and the smallest selection margin."""
    seen = {}

    def hook(layer):
        def record(gate, inputs, output):
            logits, _, ids = output
            v3 = hasattr(gate, "e_score_correction_bias")
            choice = logits.sigmoid() + gate.e_score_correction_bias if v3 else logits   # softmax keeps the order
            margin = float("inf")
            if (gate.num_group or 1) > 1 and (v3 or gate.topk_method == "group_limited_greedy"):
                grouped = choice.view(choice.shape[0], gate.num_group, -1)
                groups = grouped.topk(2, dim=-1)[0].sum(-1) if v3 else grouped.max(-1)[0]
                order = groups.sort(-1, descending=True)
                margin = (order[0][:, gate.topk_group - 1] - order[0][:, gate.topk_group]).min().item()
                mask = torch.zeros_like(groups).scatter_(1, order[1][:, : gate.topk_group], 1).bool()
                choice = grouped.masked_fill(~mask[..., None], float("-inf")).flatten(1)
            top = choice.sort(-1, descending=True)
            margin = min(margin, (top[0][:, gate.top_k - 1] - top[0][:, gate.top_k]).min().item())
            assert torch.equal(top[1][:, : gate.top_k].sort(-1)[0], ids.sort(-1)[0])
            seen[layer] = (ids.sort(-1)[0], margin)
        return record

    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(hook(i))
    return seen


def per_expert(name, tensor):
    """Yields (name, tensor) under the names of one matrix an expert."""
    head, _, last = name.rpartition(".")
    if not head.endswith("mlp.experts"):
        yield name, tensor
    elif last == "gate_up_proj":
        for e, both in enumerate(tensor):
            gate, up = both.chunk(2)
            yield f"{head}.{e}.gate_proj.weight", gate
            yield f"{head}.{e}.up_proj.weight", up
    else:
        for e, down in enumerate(tensor):
            yield f"{head}.{e}.down_proj.weight", down


def rewrite_config(folder):
    path = os.path.join(folder, "config.json")
    config = json.load(open(path))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config |= dict(rope_scaling=rope, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, aux_loss_alpha=0.001, seq_aux=True, ep_size=1)
    json.dump(config, open(path, "w"), indent=2, sort_keys=True)


def make(case):
    settings, options = CASES[case]
    folder = os.path.join(FOLDER, case)
    shutil.rmtree(folder, ignore_errors=True)
    v3 = "topk_method" not in settings
    config_type, model_type = (DeepseekV3Config, DeepseekV3ForCausalLM) if v3 else (DeepseekV2Config, DeepseekV2ForCausalLM)
    torch.manual_seed(sorted(CASES).index(case) + 1)
    model = model_type(config_type(**settings, attn_implementation="eager", experts_implementation="eager"))
    randomize(model, options.get("bias", (0.0, 0.3)))
    for p in model.parameters():   # the correction biases are buffers and stay float32, as in every checkpoint
        p.data = p.data.to(options.get("dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=options.get("max_shard_size", "5GB"), save_original_format=not options.get("stacked", False))
    os.remove(os.path.join(folder, "generation_config.json"))
    if options.get("old_spelling"):
        rewrite_config(folder)

    model = model_type.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    seen = watch_routers(model)
    for attempt in range(2000):
        ids = torch.randint(0, settings["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(attempt))
        with torch.no_grad():
            model(input_ids=ids)
        margin = min(m for _, m in seen.values())
        if margin >= MARGIN:
            break
    assert margin >= MARGIN, f"{case}: no ids with safe selections"
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    expected = {"ids": ids, "logits": output.logits.detach().contiguous(), "loss": output.loss.detach()}
    expected |= {f"topk_ids.{layer}": chosen.contiguous() for layer, (chosen, _) in seen.items()}
    for name, p in model.named_parameters():
        expected |= {"grad." + n: g.contiguous().clone() for n, g in per_expert(name, p.grad)}
    save_file(expected, os.path.join(folder, "expected.safetensors"))
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    used = [chosen.unique().numel() for chosen, _ in seen.values()]
    print(f"{case:15s} loss {output.loss.item():.4f}  margin {margin:.4f} after {attempt + 1} tries  experts used {used}  {size / 1024:.0f} KiB")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or CASES:
        make(name)

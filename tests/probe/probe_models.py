"""Tiny random models of each family, and batches for them."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}

# family -> what differs from the above; sliding windows are shorter than the test's sequences.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen3": {"head_dim": 24},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_MOE, "head_dim": 24},
    "mistral": {"sliding_window": 19},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 11,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 24,
        **_ALTERNATING,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24, **_ALTERNATING},
    "phi3": {"sliding_window": 14},
    "olmo2": {},
    "olmo3": {"sliding_window": 10, **_ALTERNATING},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512},
    "gpt_neox": {},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_ALTERNATING,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.3},
    "afmoe": {**_MOE, "head_dim": 16},  # passes the mask by keyword
}


def tiny_model(family: str, implementation: str = "sdpa", seed: int = 0, **overrides):
    """A random causal LM in eval mode, with attention sharp enough to tell heads and tokens apart."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_TINY, **FAMILIES.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                weight.normal_(std=2.0 * weight.shape[-1] ** -0.5)
            elif "sinks" in name:
                weight.normal_()
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padded_batch(length: int = 72) -> dict[str, torch.Tensor]:
    """Left padding, no padding, right padding, and both."""
    mask = torch.ones(4, length, dtype=torch.long)
    mask[0, :13] = 0
    mask[2, length - 9 :] = 0
    mask[3, :5] = 0
    mask[3, length - 30 :] = 0
    return {"input_ids": tokens(4, length), "attention_mask": mask}


def packed_batch(lengths=(17, 40, 1, 26)) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, int]]]:
    """A row of several sequences, told apart by their positions, and their bounds."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    bounds = [(0, end - n, end) for n, end in zip(lengths, ends)]
    return {"input_ids": tokens(1, positions.shape[1]), "position_ids": positions}, bounds

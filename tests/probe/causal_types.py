"""A small random model of every causal language model type of the installed transformers.

One function shrinks whatever a configuration names by what it is called; `OVERRIDES` holds, for the types to which that
does not fit, what else they need.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
TABLE_OF = "5.24"  # the transformers for which the small configurations and `causal_outcomes` were made
TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
_MOST_PARAMETERS = 20_000_000

# Names that configurations share -> small values. Windows and chunks are shorter than the sequences of the test, and
# fewer keys are chosen than there are.
_SMALL: dict[tuple[str, ...], int] = {
    ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"): VOCABULARY,
    ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "dim_model", "emb_dim"): 64,
    ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"): 96,
    ("ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"): 96,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"): 4,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads"): 2,
    ("swa_num_attention_heads",): 4,
    ("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim", "rotary_dim"): 16,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"): 512,
    ("sliding_window", "sliding_window_size"): 12,
    ("attention_chunk_size",): 15,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"): 2,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"): 32,
    ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"): 1,
    ("num_expert_group",): 1,
    ("q_lora_rank",): 32,
    ("kv_lora_rank", "qk_nope_head_dim"): 16,
    ("qk_rope_head_dim",): 8,
    ("v_head_dim", "swa_v_head_dim"): 12,
    ("index_topk",): 8,
    ("index_head_dim",): 16,
    ("index_n_heads",): 2,
    ("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_ssm_state"): 8,
    ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"): 4,
    ("mamba_d_head", "mamba_headdim", "mamba_head_dim"): 32,
    ("mamba_n_groups", "mamba_ngroups", "n_groups"): 1,
    ("mamba_d_ssm",): 128,
    ("mamba_dt_rank", "time_step_rank"): 4,
    ("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"): 2,
    ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"): 16,
    ("image_size",): 16,
    ("patch_size",): 8,
}
_BY_NAME = {name: value for names, value in _SMALL.items() for name in names}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_DOTS3 = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse"] * 2,
    "per_layer_config": {},
    "n_routed_experts": 4,
    "shared_experts_intermediate_size": 32,
    "num_key_value_heads": 4,
    "head_dim": 24,
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "ple_embed_dim": 64,
}

# Model type -> what its configuration needs beside the small values; a dict under a sub-configuration's name is its.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 64,
        "patch_in_forward": False,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64, "head_dim": 16},
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, **_MLA},
    "deepseek_v3": _MLA,
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
        + ["sliding_attention"]
    },
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, **_MLA},
    "longcat_flash": {"num_layers": 2, **_MLA},  # of two attentions each
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 64)},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "use_mamba_kernels": False,  # some versions of transformers have no others on a CPU unless told so
    },
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}

# Model types whose causal language model is built from a part of their configuration.
DECODERS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def is_of_table() -> bool:
    """Whether the installed transformers is the one of the tables, or newer."""
    found, of_table = (tuple(map(int, version.split(".")[:2])) for version in (transformers.__version__, TABLE_OF))
    return found >= of_table


def small(config_class: Any, overrides: dict[str, Any]) -> Any:
    """A configuration of this class in which all that takes memory or time is small."""
    default = config_class()
    parts = getattr(config_class, "sub_configs", {})
    names = {*inspect.signature(config_class.__init__).parameters, *vars(default)}
    named: dict[str, Any] = {}
    for name in names:
        value = vars(default).get(name)
        if name in _BY_NAME and type(value) is int:
            named[name] = min(value, _BY_NAME[name]) if value > 0 else value
        elif name in _TOKENS and value is not None:
            named[name] = _TOKENS[name]
    if vars(default).get("num_key_value_heads") == vars(default).get("num_attention_heads"):
        named["num_key_value_heads"] = named.get("num_attention_heads")
    for name, kind in parts.items():
        part = getattr(default, name, None)
        if part is not None:
            kind = type(part) if hasattr(part, "to_dict") else kind
            named[name] = small(kind, overrides.get(name, {})).to_dict()
    named.update({name: value for name, value in overrides.items() if name not in parts})
    return config_class(**{name: value for name, value in named.items() if value is not None})


def build(model_type: str) -> Any:
    """A random model in eval mode under eager attention, with attention sharp enough to tell heads and tokens apart.

    A test of a type that the installed transformers does not have is skipped.
    """
    if model_type not in TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    torch.manual_seed(0)
    config = small(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    config.is_decoder = True  # of those that may be encoders too
    make = AutoModelForCausalLM.from_config
    if model_type in DECODERS:
        make = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config
        config = getattr(config, DECODERS[model_type])
    with torch.device("meta"):  # how many numbers, before they are made
        size = sum(parameter.numel() for parameter in make(config, attn_implementation="eager").parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"the small {model_type} has {size:,} parameters: name what makes it large")
    model: Any = make(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            projection = any(part in name for part in ("attn", "attention", "mixer", "q_proj", "k_proj"))
            if weight.dim() == 2 and projection:
                weight.normal_(std=2.0 * weight.shape[-1] ** -0.5)
            elif "sink" in name:
                weight.normal_()
    return model

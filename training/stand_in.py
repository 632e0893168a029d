"""Small random models of transformers' classes, and a tokenizer of bytes, for where the real ones are not at hand.

A stand-in has the parts of the real model (its kinds of layers, grouped heads, sinks, experts), so that what its class
or a setting does not support shows; it knows nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rhythm_kernels.probe.structure import find_decoder

from .settings import RecipeError

PAD, EOS = "<pad>", "<eos>"
SEED = 0
LAYERS, HEADS, HEAD_DIM = 4, 4, 16  # at least four layers: `rhythm.layers=middle5` then has two to sample
HIDDEN = HEADS * HEAD_DIM
WINDOW = 32  # a sliding window of at most so many tokens: responses of a dry run are longer, so that it is seen
POSITIONS = 32768  # of a class whose real configuration is not known
_MOST_LAYERS = 12
_MOST_PARAMETERS = 3_000_000  # besides embeddings and logits, whose size is the vocabulary's

# What shrinks a configuration, by the names that transformers' configurations give to one thing.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(
        (
            *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner"),
            *("intermediate_size_mlp", "ffn_hidden_size"),
        ),
        2 * HIDDEN,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head"), HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar", "rotary_dim"), HEAD_DIM),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    # Multi-head latent attention.
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), HEAD_DIM),
    "qk_head_dim": 2 * HEAD_DIM,
    # Linear attention, which stands between layers of softmax attention in some models.
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(("hidden_size_per_layer_input",), HEAD_DIM),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers"), 0),
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_KV_HEADS = ("num_key_value_heads", "num_global_key_value_heads")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_POSITIONS = ("max_position_embeddings", "n_positions")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_DROPPED = (
    "quantization_config",
    "per_layer_config",
    "_name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
)

# A chat as lines: who speaks, in brackets, and what is said. It holds no special token, so every text stays text.
_CHAT = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte of UTF-8, and two more, to pad and to end; 258 in all.

    Every text comes back from its tokens as it was, `<eos>` in a text included: there it is five bytes. Prompts are
    padded on the left, as generation needs, and nothing is added to a text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def causal_class(name: str) -> Any:
    """The class of transformers that `model.architecture` names.

    Raises:
        RecipeError: where transformers has no such class, or it is no language model of decoder layers alone.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = getattr(transformers, name, None) if name in known else None
    if getattr(found, "config_class", None) is None:
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "for example Qwen3ForCausalLM or LlamaForCausalLM"
        raise RecipeError(f"model.architecture must be a causal language model of transformers, got {name!r}: {hint}")
    return found


def class_of(config: Any) -> Any:
    """The class of the language model that a configuration describes; of one that also sees, its part that reads.

    Raises:
        RecipeError: where transformers has none.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    found = AutoModelForCausalLM._model_mapping.get(type(text), None)
    if found is None:
        raise RecipeError(f"model: {type(config).__name__} is not the configuration of a causal language model")
    return found[0] if isinstance(found, tuple) else found


def small_config(config: Any, vocabulary: int, *, known: bool) -> Any:
    """A configuration of the same kind, with the same switches, and small sizes.

    Args:
        config: the real one, or one of the class's defaults.
        vocabulary: tokens of the tokenizer.
        known: whether `config` is the real one; then positions and the sharing of kv heads are kept.
    """
    text = config.get_text_config(decoder=True)
    old = text.to_dict()
    new = {key: value for key, value in old.items() if key not in _DROPPED}
    new |= {key: size for key, size in _SIZES.items() if isinstance(old.get(key), int)}
    if "head_dim" in old:  # None, in some: their classes do without, or forget to
        new["head_dim"] = HEAD_DIM
    heads = next((old[key] for key in ("num_attention_heads", "n_head") if old.get(key)), None)
    latent = "kv_lora_rank" in old  # there, the number of kv heads is that of the heads
    for key in _KV_HEADS:
        if key in old:
            alike = latent or (known and old[key] == heads)
            new[key] = HEADS if alike else 1 if known and old[key] == 1 else HEADS // 2
    new |= {key: min(old[key], WINDOW) for key in _WINDOWS if old.get(key)}
    new |= {key: vocabulary for key in _VOCABULARIES if old.get(key)}
    if not known:
        new |= {key: max(old[key], POSITIONS) for key in _POSITIONS if old.get(key)}
    rope = old.get("rope_parameters")
    if isinstance(rope, Mapping):
        new["rope_parameters"] = _scaled(rope)
    layers = next((old[key] for key in _LAYERS if old.get(key)), LAYERS)
    count = _layers(old, layers)
    new |= {key: count for key in _LAYERS if old.get(key)}
    for key, value in old.items():  # lists with an entry a layer
        if isinstance(value, list) and len(value) == layers:
            new[key] = value[:count]
    return type(text)(**new)


def _layers(config: Mapping[str, Any], layers: int) -> int:
    """The fewest, at least four, that have every kind of layer, and softmax attention in the middle third."""
    kinds = config.get("layer_types") or []
    fewest = max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))])
    for count in range(fewest, min(layers, _MOST_LAYERS) + 1):
        middle = kinds[count // 3 : 2 * count // 3 + 1]
        if not kinds or any(kind in ("full_attention", "sliding_attention") for kind in middle):
            return count
    return min(layers, fewest, _MOST_LAYERS)


def _scaled(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, without those that have an entry for each pair of a head's channels."""
    if any(isinstance(value, list | tuple) for value in rope.values()):
        return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
    return {key: _scaled(value) if isinstance(value, Mapping) else value for key, value in rope.items()}


def random_model(kind: Any, config: Any, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of class `kind` with a configuration of `small_config`, on the CPU, the same at every call.

    Raises:
        RecipeError: where it does not come out small, cannot be built or does not run, or its attention cannot be
            measured.
    """
    refused = f"model: a small {kind.__name__} cannot be made"
    try:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            token = getattr(tokenizer, name)
            setattr(config, name, tokenizer.eos_token_id if token is None else token)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            with torch.device("meta"):
                inner = kind(config)
            rest = sum(p.numel() for p in inner.parameters() if config.vocab_size not in p.shape)
            if rest > _MOST_PARAMETERS:
                raise ValueError(f"{rest:,} parameters are left besides its embeddings")
            model = kind(config).to(dtype)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 2, dtype=torch.long))
        find_decoder(model)
    except Exception as error:  # of any kind, likewise
        raise RecipeError(f"{refused}: {type(error).__name__}: {error}") from error
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def stand_in(architecture: str, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A small random model of a class of transformers, and its tokenizer: that of bytes unless one is given.

    Raises:
        RecipeError: for a class that is not there or cannot be shrunk.
    """
    kind = causal_class(architecture)
    tokenizer = tokenizer or byte_tokenizer()
    try:
        config = kind.config_class()
        if config.get_text_config(decoder=True) is not config:
            kind = class_of(config)  # of a model that also sees, the part that reads
        config = small_config(config, len(tokenizer), known=False)
    except Exception as error:  # of any kind: a class of transformers may ask for anything
        raise RecipeError(f"model: a small {architecture} cannot be made: {type(error).__name__}: {error}") from error
    return random_model(kind, config, tokenizer, dtype), tokenizer


def parameters(config: Any) -> int:
    """The number of parameters of the model that a configuration describes; nothing of its size is allocated."""
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        return sum(p.numel() for p in class_of(text)(text).parameters())

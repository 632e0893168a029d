"""What becomes of each causal language model type of transformers 5.24: what `test_probe_every_type.py` expects.

`MEASURED` are measured right under every implementation that transformers lets them have. What else a type may come to:
`refused: WORDS`, by the probe or by rhythm attention, whose error has these words; `cannot be built: WORDS`; and
`cannot run: WORDS`, where the model's own forward fails on text alone. Of Gemma 3n and Gemma 4, two of the four layers
share keys and values with the others.
"""

from __future__ import annotations

_NOT_IN_REGISTRY = "refused: so there is nothing to measure"
_SPARSE = "refused: it chooses its keys"
_OUTER_MASKS = "refused: makes the attention masks outside of its language model"
_TWICE = "refused: attended twice in one forward"
_ALIBI = "refused: adds ALiBi"
_BIAS = "refused: adds a position bias"
_MASK_READ = "refused: this model computes with its attention mask"
_PASSED_ALONG = "cannot run: shared_kv_states cannot be None"

# Types that are not wholly measured: an outcome, or one for each implementation that differs from measured.
EXCEPT: dict[str, str | dict[str, str]] = {
    "axk2": _SPARSE,
    "big_bird": _NOT_IN_REGISTRY,
    "bigbird_pegasus": _NOT_IN_REGISTRY,
    "bloom": _ALIBI,
    "blt": "refused: both call themselves layer 0",
    "cpmant": _NOT_IN_REGISTRY,
    "deepseek_v32": _SPARSE,
    "deepseek_v4": {"rhythm": "refused: attends to keys that are no tokens' own"},  # its sliding layers
    "diffllama": _TWICE,
    "doge": {"eager": "refused: adds a bias", "sdpa": "refused: adds a bias", "rhythm": _MASK_READ},
    "dory": _TWICE,
    "dots3_note": "cannot be built: per_layer_config",
    "dots3_note_text": {"rhythm": _MASK_READ},  # its sliding layers
    "falcon": _NOT_IN_REGISTRY,
    "falcon_mamba": _NOT_IN_REGISTRY,
    "gemma3": _OUTER_MASKS,
    "gemma3n": "cannot be built: timm",
    "gemma4": _OUTER_MASKS,
    "gemma4_assistant": "cannot be built: hidden_size_per_layer_input must be 0",  # its own default
    "gemma4_unified": _OUTER_MASKS,
    "gemma4_unified_assistant": _PASSED_ALONG,
    "git": _NOT_IN_REGISTRY,
    "glm_moe_dsa": _SPARSE,
    "gpt_neo": _NOT_IN_REGISTRY,
    "gpt_neox_japanese": _NOT_IN_REGISTRY,
    "hrm_text": "refused: both call themselves layer 0",
    "hy_v4": _SPARSE,
    "inkling2_loop_text": _BIAS,
    "inkling2_text": _BIAS,
    "inkling_text": _BIAS,
    "mamba": _NOT_IN_REGISTRY,
    "mamba2": _NOT_IN_REGISTRY,
    "megatron-bert": _NOT_IN_REGISTRY,
    "mpt": _ALIBI,
    "mvp": _NOT_IN_REGISTRY,
    "openai-gpt": _NOT_IN_REGISTRY,
    "prophetnet": _NOT_IN_REGISTRY,
    "qwen4_exp": _SPARSE,
    "qwen4_exp_text": _SPARSE,
    "reformer": _NOT_IN_REGISTRY,
    "rembert": _NOT_IN_REGISTRY,
    "roformer": _NOT_IN_REGISTRY,
    "rwkv": _NOT_IN_REGISTRY,
    "trocr": _NOT_IN_REGISTRY,
    "xglm": _NOT_IN_REGISTRY,
    "xlm": _NOT_IN_REGISTRY,
    "xlnet": _NOT_IN_REGISTRY,
    "xlstm": _NOT_IN_REGISTRY,
}
# Of releases before that of this table.
BEFORE: dict[str, str | dict[str, str]] = {
    "codegen": _NOT_IN_REGISTRY,
    "gemma2": {"sdpa": "refused: has a softcap"},  # which transformers lets it have, and leaves out
    "gptj": _NOT_IN_REGISTRY,
    "vaultgemma": {"sdpa": "refused: has a softcap"},
}
_MEASURED = """
afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba bart beam bert bert-generation biogpt bitnet
blenderbot blenderbot-small camembert codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm data2vec-text
dbrx deepseek_v2 deepseek_v3 dots1 electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe
glm4_moe_lite got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2
jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash marian
mbart mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama
modernbert-decoder moshi moss_transcribe_diarize musicgen musicgen_melody nanochat nemotron nemotron_h olmo olmo2
olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5
qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta roberta-prelayernorm roc_bert
sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl
xmod youtu zamba zamba2 zaya
"""
MEASURED = frozenset(_MEASURED.split())


def expected(model_type: str, implementation: str, before: bool = False) -> str | None:
    """`measured`, or one of the outcomes above; None for a type that is not known yet.

    Args:
        before: whether the installed transformers is older than the table.
    """
    exception = BEFORE.get(model_type) if before else None
    if exception is None:
        exception = "measured" if model_type in MEASURED else EXCEPT.get(model_type)
    return exception.get(implementation, "measured") if isinstance(exception, dict) else exception

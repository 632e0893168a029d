"""What is known when a probe is built: which layers can be measured, and why others, or a whole model, cannot."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from . import causal_types
from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

TEXT = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SOME = HeadGroups([(0, 0)], [(1, 1)])


def with_vision(kind: str):
    options = {"text_config": TEXT, "vision_config": VISION, "image_token_id": 90, "image_token_index": 90}
    if kind == "gemma3":
        options |= {"mm_tokens_per_image": 4, "boi_token_id": 91, "eoi_token_id": 92}
    if kind == "paligemma":
        options |= {"text_config": {"model_type": "gemma", **TEXT}, "projection_dim": 32, "hidden_size": 32}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **options)).eval()


def test_masks_made_outside_of_the_language_model():
    model = with_vision("gemma3")
    refused = "makes the attention masks outside of its language model.*Gemma3ForCausalLM"
    with pytest.raises(ValueError, match=refused):
        RhythmProbe(model, SOME)
    with pytest.raises(ValueError, match=refused):
        head_groups(model, [])
    decoder = model.get_decoder()  # the way out
    with torch.no_grad(), RhythmProbe(decoder, SOME) as probe:
        decoder(models.tokens(2, 20), use_cache=False)
    assert probe.waad.any()


def test_language_models_that_see_in_both_directions():
    with pytest.raises(ValueError, match="no layer of GemmaModel has causal softmax attention"):
        RhythmProbe(with_vision("paligemma"), SOME)


def test_encoders_that_make_masks_of_their_own_are_no_reason():
    decoder = find_decoder(with_vision("llava"))
    assert sorted(decoder.attentions) == [0, 1]


@pytest.mark.parametrize("kind", ["zamba", "zamba2"])
def test_shared_blocks_are_told_apart_by_their_place(kind):
    model = causal_types.build(kind)
    decoder = find_decoder(model)
    assert sorted(decoder.attentions) == [1, 3]
    assert attention_layers(decoder, "middle5") == [1]
    groups = HeadGroups([(1, 0), (3, 2)], [(3, 3)])
    batch = {"input_ids": models.tokens(2, 30), "use_cache": False}
    found = eager_maps(model, **batch)
    maps = found if len(found) == 4 else dict(zip((1, 3), found.values()))
    with torch.no_grad(), RhythmProbe(model, groups) as probe:
        model(**batch)
    waad, fai = oracle(maps, groups, padded_bounds(torch.ones(2, 30)))
    torch.testing.assert_close(probe.waad.double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=1e-4, rtol=0)


def test_a_module_that_is_in_several_layers():
    model = models.tiny_model("qwen3")
    layers = model.model.layers
    layers[3].self_attn = layers[1].self_attn
    layers[1].self_attn.layer_idx = -1
    decoder = find_decoder(model)
    assert sorted(decoder.attentions) == [0, 2]
    with pytest.raises(ValueError, match=r"groups must be .* measured, got layer 3: it shares one Qwen3Attention"):
        RhythmProbe(model, HeadGroups([(0, 0)], [(3, 0)]))


def test_compressed_keys_are_left_out():
    model = causal_types.build("deepseek_v4")
    decoder = find_decoder(model)
    assert sorted(decoder.attentions) == [0, 3]
    with pytest.raises(ValueError, match="measured, got layer 1: it attends to compressed keys"):
        attention_layers(decoder, [0, 1])
    with pytest.raises(ValueError, match="measured, got layer 2: it attends to compressed keys"):
        RhythmProbe(model, HeadGroups([(0, 0)], [(2, 0)]))


@pytest.mark.parametrize("padded", [False, True])
def test_compressed_keys_under_rhythm_attention(padded):
    register()
    model = causal_types.build("deepseek_v4")
    model.set_attn_implementation("rhythm")
    batch = {"input_ids": models.tokens(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    batch["attention_mask"][0, :5] = int(not padded)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="DeepseekV4Attention attends to keys that are no"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention(kind):
    """Rows shorter than the keys it chooses would be measured, until a run's rows outgrow them."""
    with pytest.raises(ValueError, match="chooses its keys"):
        RhythmProbe(causal_types.build(kind), SOME)


def test_heads_that_are_too_large():
    """Gemma 4's layers of full attention have heads of 512."""
    config = causal_types.small(AutoConfig.for_model("gemma4_text").__class__, causal_types.OVERRIDES["gemma4_text"])
    decoder = find_decoder(AutoModelForCausalLM.from_config(config))
    assert sorted(decoder.attentions) == [0, 1, 2, 3]
    large = {**causal_types.OVERRIDES["gemma4_text"], "global_head_dim": 512}
    decoder = find_decoder(AutoModelForCausalLM.from_config(causal_types.small(type(config), large)))
    assert attention_layers(decoder, "all") == [0, 2]
    with pytest.raises(ValueError, match="measured, got layer 1: its heads are of size 512"):
        attention_layers(decoder, [1])


def test_cross_attention_is_no_layer_to_measure():
    decoder = find_decoder(causal_types.build("mllama"))
    assert sorted(decoder.attentions) == [0, 1, 2]


def test_attention_by_another_name():
    """LongCat's MLA: two of them a layer, each with an index of its own."""
    assert sorted(find_decoder(causal_types.build("longcat_flash")).attentions) == [0, 1, 2, 3]


def test_several_stacks_that_count_from_0():
    with pytest.raises(ValueError, match="both call themselves layer 0"):
        find_decoder(causal_types.build("blt"))


def test_attention_with_a_function_of_its_own():
    with pytest.raises(ValueError, match="so there is nothing to measure"):
        RhythmProbe(causal_types.build("falcon"), SOME)


def test_softcap_that_sdpa_leaves_out():
    """Some versions of transformers let a model of softcap have sdpa, which computes without it."""
    model = models.tiny_model("gemma2", "eager")
    model.config._attn_implementation = "sdpa"
    with torch.no_grad(), RhythmProbe(model, SOME), pytest.raises(ValueError, match="has a softcap, which 'sdpa'"):
        model(models.tokens(2, 20), use_cache=False)

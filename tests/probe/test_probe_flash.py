"""flash_attention_2: the log-sum-exp of flash-attn's own operators, through transformers' padding and packing code."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups

from . import flash_standin
from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

GROUPS = HeadGroups(local=[(0, 0), (0, 3), (1, 1), (3, 2)], global_=[(1, 0), (1, 3), (2, 2), (3, 3)])
FAMILIES = ["llama", "qwen3", "qwen2", "mistral", "gemma2", "gpt_neox"]  # windows, softcap, fused projections


def probed(model, batch, response=None):
    with flash_standin.installed(model), torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS, response_mask=response) as probe:
            assert torch.equal(model(**batch, use_cache=False).logits, plain)
    return probe


def check(probe, expected):
    torch.testing.assert_close(probe.waad.double(), expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpadded(family):
    model = models.tiny_model(family, "eager")
    batch = {"input_ids": models.tokens(2, 70)}
    probe = probed(model, batch)
    assert set(probe.lse_source.values()) == {"flash-attn"}
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(torch.ones(2, 70))))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded(family):
    model = models.tiny_model(family, "eager")
    batch = models.padded_batch()
    response = batch["attention_mask"].bool().clone()
    response[:, :30] = False
    probe = probed(model, batch, response)
    assert set(probe.lse_source.values()) == {"flash-attn (varlen)"}
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(batch["attention_mask"]), response))


def test_a_batch_of_padding_alone():
    """As one rank's share of a batch may be: nothing to measure, and no error."""
    model = models.tiny_model("mistral", "eager")
    batch = models.padded_batch()
    batch["attention_mask"].zero_()
    probe = probed(model, batch)
    assert not probe.waad.any() and not probe.fai.any()


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both", "beside a mask", "ready masks"])
def test_packed(how):
    model = models.tiny_model("qwen3", "eager")
    batch, bounds = models.packed_batch()
    expected = oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds)
    if how in ("cu_seq_lens", "both", "ready masks"):
        ends = torch.tensor([0, *(end for _, _, end in bounds)], dtype=torch.int32)
        batch.update(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=40, max_length_k=40)
    if how == "beside a mask":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if how == "ready masks":  # made outside of the model, as AReaL does: no layer gets one
        batch["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    probe = probed(model, batch)
    assert set(probe.lse_source.values()) == {"flash-attn (varlen)"}
    check(probe, expected)


def test_sdpa_under_ready_masks_keeps_nothing_apart():
    """Positions that start again are packing only where masks are made of them."""
    model, (batch, _) = models.tiny_model("qwen3"), models.packed_batch()
    ready = {"full_attention": None, "sliding_attention": None}
    with (
        pytest.raises(ValueError, match="position_ids must increase along a batch row"),
        torch.no_grad(),
        RhythmProbe(model, GROUPS),
    ):
        model(**batch, attention_mask=ready, use_cache=False)


def test_the_sequences_are_those_that_the_kernel_was_given():
    """Flash attention packs where positions are at their least, in one row, and by lengths given with their maxima."""
    model = models.tiny_model("llama", "eager")
    batch, bounds = models.packed_batch()
    with pytest.raises(ValueError, match="start again within one"):
        probed(model, {name: x.repeat(2, 1) for name, x in batch.items()})
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    jump = {"input_ids": ids, "position_ids": torch.arange(length)[None] + 9 * (torch.arange(length) > 20)}
    maps = eager_maps(model, **jump, attention_mask=torch.ones_like(ids))
    check(probed(model, jump), oracle(maps, GROUPS, [(0, 0, length)]))
    ends = torch.tensor([0, *(end for _, _, end in bounds)], dtype=torch.int32)
    incomplete = {"input_ids": ids, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    check(probed(model, incomplete), oracle(eager_maps(model, input_ids=ids), GROUPS, [(0, 0, length)]))


def test_query_precision_is_the_kernels():
    """transformers lowers float32 queries for flash-attn under autocast: the measures must be of the lowered ones."""
    model = models.tiny_model("qwen3", "eager")
    batch = {"input_ids": models.tokens(2, 70)}
    with torch.autocast("cpu", torch.bfloat16):
        probe = probed(model, batch)
    waad, _ = oracle(eager_maps(model, **batch), GROUPS, padded_bounds(torch.ones(2, 70)))
    torch.testing.assert_close(probe.waad.double(), waad, atol=0.5, rtol=0)


def test_kernels_without_a_known_operator_are_streamed():
    def plain(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):
        return torch.stack(
            [flash_standin._dense(*row, softmax_scale, causal, *window_size, softcap)[0] for row in zip(q, k, v)]
        )

    model = models.tiny_model("mistral", "eager")
    batch = {"input_ids": models.tokens(2, 70)}
    with flash_standin.installed(model, func=plain), torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(**batch)
    assert set(probe.lse_source.values()) == {"streamed from q and k"}
    check(probe, oracle(eager_maps(model, **batch), GROUPS, padded_bounds(torch.ones(2, 70))))


def test_calibration_agrees_with_eager():
    model = models.tiny_model("qwen3", "eager")
    batch = models.padded_batch()
    expected = head_groups(model, [batch], layers="all")
    with flash_standin.installed(model):
        assert head_groups(model, [batch], layers="all") == expected


def test_sinks_that_flash_attention_2_drops_are_refused():
    model = models.tiny_model("gpt_oss", "eager")
    with (
        flash_standin.installed(model),
        torch.no_grad(),
        RhythmProbe(model, GROUPS),
        pytest.raises(ValueError, match="sinks"),
    ):
        model(models.tokens(2, 40))

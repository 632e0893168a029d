"""transformers as a peer: the measures of a real layer's q and k against the maps that its eager attention returns.

What the layers hand to their attention function is caught there; nothing of the expectation comes from this package.
(The probe is held to the same maps in tests/probe; here each op is, on every backend.)
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import rhythm_kernels as rk

from . import bounds

TINY = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS = {
    "llama": {name: value for name, value in TINY.items() if name != "layer_types"},
    "gemma2": {**TINY, "sliding_window": 11, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gpt_oss": {**TINY, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
BATCH, LENGTH, PADDING, RESPONSE = 2, 41, 6, 15
LIVE = [(0, LENGTH), (PADDING, LENGTH)]  # row 1 is padded on the left
BACKENDS = ["reference", "torch", *(name for name in ("cpu", "triton") if not rk.backends()[name])]


class Layer(NamedTuple):
    q: Tensor  # (B, T, H, D)
    k: Tensor
    options: dict[str, Any]
    maps: Tensor  # (B, H, T, T)


@functools.cache
def layers(family: str) -> list[Layer]:
    """q, k, the score rule and the map of each layer of a small random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "sinks" in name or name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.normal_(std=1.0 if "sinks" in name else 0.3)  # attention that tells tokens apart
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    eager, caught = module.eager_attention_forward, []

    def caught_attention(layer, query, key, value, mask, *, scaling, sliding_window=None, softcap=None, **kwargs):
        options = {
            "softmax_scale": scaling,
            "window_size": (-1 if sliding_window is None else sliding_window - 1, 0),
            "softcap": softcap or 0.0,
            "sinks": getattr(layer, "sinks", None),
        }
        caught.append((query.transpose(1, 2), key.transpose(1, 2), options))
        kwargs["softcap"] = softcap
        return eager(layer, query, key, value, mask, scaling=scaling, sliding_window=sliding_window, **kwargs)

    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :PADDING] = 0
    tokens = torch.randint(3, 61, (BATCH, LENGTH))
    with mock.patch.object(module, "eager_attention_forward", caught_attention), torch.no_grad():
        maps = model(tokens, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    return [Layer(q, k, options, one.double()) for (q, k, options), one in zip(caught, maps, strict=True)]


def of_rows(maps: Tensor, weight: Tensor) -> Tensor:
    """`sum over s of A[t, s] weight(t - s)` for the response rows, `(B, H, T)`."""
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(min=0)
    rows = (maps * weight[distance]).sum(-1)
    rows[:, :, :RESPONSE] = 0
    return rows


def of_columns(maps: Tensor, first: int, last: int, statistic) -> Tensor:
    """`statistic` of `A[t, s]` over the rows `first <= t - s <= last` for the response tokens s, `(B, H, T)`."""
    out = torch.zeros(maps.shape[:3], dtype=torch.float64)
    for s in range(RESPONSE, LENGTH - first):
        out[:, :, s] = statistic(maps[:, :, s + first : s + last + 1, s])
    return out


def standardised(order: int):
    """The standardised moment of that order over the last dimension, 0 for fewer than two values."""

    def moment(x: Tensor) -> Tensor:
        if x.shape[-1] < 2:
            return torch.zeros(x.shape[:-1], dtype=x.dtype)
        deviation = x - x.mean(-1, keepdim=True)
        return (deviation**order).mean(-1) / (deviation**2).mean(-1) ** (order / 2)

    return moment


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", MODELS)
def test_against_eager_maps(family: str, backend: str) -> None:
    softcaps, windows, sinks = set(), set(), set()
    for q, k, options, maps in layers(family):
        softcaps.add(options["softcap"])
        windows.add(options["window_size"][0])
        sinks.add(options["sinks"] is not None)
        ranges = {"seq_start": torch.tensor([start for start, _ in LIVE], dtype=torch.int32)}
        lse = rk.attention_lse(q, k, backend=backend, **options, **ranges)
        rest = {"response_start": torch.full((BATCH,), RESPONSE, dtype=torch.int32), **ranges, "per_head": True}
        call = functools.partial(torch.testing.assert_close, rtol=0, check_dtype=False)
        distances = torch.arange(LENGTH, dtype=torch.float64)
        for given in (None, lse):
            arguments = {"backend": backend, **options, **rest}
            waad = rk.waad(q, k, given, window=5, **arguments)
            call(waad, of_rows(maps, distances.clamp(max=5)), atol=bounds.waad(5))
            short = rk.fai(q, k, given, horizon=(3, 12), **arguments)
            call(short, of_columns(maps, 3, 12, lambda x: x.mean(-1)), atol=1e-5)
            moments = rk.column_moments(q, k, given, min_distance=2, **arguments)
            call(moments.mean, of_columns(maps, 2, LENGTH, lambda x: x.mean(-1)), atol=1e-5)
            call(moments.variance, of_columns(maps, 2, LENGTH, lambda x: x.var(-1, correction=0)), atol=1e-5)
            if options["window_size"][0] < 0:  # behind a window the model's zeros leave some columns no variance
                call(moments.skewness, of_columns(maps, 2, LENGTH, standardised(3)), atol=1e-3)
                call(moments.kurtosis, of_columns(maps, 2, LENGTH, standardised(4)), atol=1e-3)
        span = rk.span(q, k, backend=backend, **options, **rest)
        call(span, of_rows(maps, distances), atol=1e-3)
    assert any(softcaps) == (family == "gemma2")
    assert sinks == {family == "gpt_oss"}
    assert (max(windows) < 0) == (family == "llama")


@pytest.mark.parametrize("family", MODELS)
def test_the_maps_tell_tokens_apart(family: str) -> None:
    """A peer whose maps are flat would agree with much that is wrong."""
    for layer in layers(family):
        sharpest = layer.maps[:, :, RESPONSE:].max(-1).values
        assert sharpest.mean() > 0.15, family  # uniform: 0.04
        assert sharpest.std() > 0.05, family

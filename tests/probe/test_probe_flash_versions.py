"""flash_attention_3, its build on the kernels hub, and flash_attention_4: the log-sum-exp of their own returns."""

from __future__ import annotations

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm_kernels import HeadGroups, RhythmProbe

from . import flash_standin
from . import probe_models as models
from .flash_versions import PACKAGES, FlashAttn3, FlashAttn4
from .probe_oracle import eager_maps, oracle, padded_bounds

GROUPS = HeadGroups(local=[(0, 0), (0, 3), (1, 1), (3, 2)], global_=[(1, 0), (1, 3), (2, 2), (3, 3)])
FAMILIES = ["qwen3", "mistral", "gemma2", "gpt_oss"]  # grouped heads, windows, softcap, sinks


def installed(model, package):
    return flash_standin.installed(model, package.flash_attn_func, package.flash_attn_varlen_func, package.name)


@pytest.fixture(autouse=True)
def hub_name_is_registered():
    """What transformers does when it loads an attention kernel from the hub."""
    name = "kernels-community/vllm-flash-attn3"
    ALL_ATTENTION_FUNCTIONS.register(name, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(name, AttentionMaskInterface()["flash_attention_2"])
    yield
    del type(ALL_ATTENTION_FUNCTIONS)._global_mapping[name]
    del AttentionMaskInterface._global_mapping[name]


CASES = [
    (package, family, layout)
    for package in PACKAGES
    for family in FAMILIES
    for layout in ("unpadded", "padded", "packed")
    if family != "gpt_oss" or (package.sinks and layout != "packed")
]


@pytest.mark.parametrize(("package", "family", "layout"), CASES)
def test_against_eager_maps(package, family, layout):
    model = models.tiny_model(family, "eager")
    batch = {"input_ids": models.tokens(2, 70)}
    bounds = padded_bounds(torch.ones(2, 70))
    if layout == "padded":
        batch = models.padded_batch()
        bounds = padded_bounds(batch["attention_mask"])
    if layout == "packed":
        batch, bounds = models.packed_batch()
    maps = eager_maps(model, **batch, use_cache=False)
    with installed(model, package), torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS) as probe:
            assert torch.equal(model(**batch, use_cache=False).logits, plain)
    source = "flash-attn" if layout == "unpadded" else "flash-attn (varlen)"
    assert set(probe.lse_source.values()) == {source}
    for got, want in zip((probe.waad, probe.fai), oracle(maps, GROUPS, bounds)):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("package", PACKAGES)
def test_gradients_are_identical(package):
    model = models.tiny_model("qwen3", "eager").train()
    batch = models.padded_batch()

    def gradients():
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits
        (logits.log_softmax(-1)[..., 3] * batch["attention_mask"]).sum().backward()
        return [p.grad for p in model.parameters()]

    with installed(model, package):
        plain = gradients()
        with RhythmProbe(model, GROUPS) as probe:
            probed = gradients()
    assert all(torch.equal(*pair) for pair in zip(plain, probed))
    assert set(probe.lse_source.values()) == {"flash-attn (varlen)"}


def test_sinks_that_the_package_does_not_know_are_refused():
    """transformers drops them without a word where the function has no parameter for them."""
    model = models.tiny_model("gpt_oss", "eager")
    refused = pytest.raises(ValueError, match="leaves out")
    with installed(model, FlashAttn3), torch.no_grad(), RhythmProbe(model, GROUPS), refused:
        model(models.tokens(2, 40))
    with installed(model, FlashAttn4), torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(models.tokens(2, 40))
    assert probe.waad.shape == (2, 40)


def test_the_packages_functions_are_put_back():
    model = models.tiny_model("qwen3", "eager")
    with installed(model, FlashAttn4):
        with torch.no_grad(), RhythmProbe(model, GROUPS):
            model(models.tokens(2, 20))
        assert utils._flash_fn is FlashAttn4.flash_attn_func
        assert utils._flash_varlen_fn is FlashAttn4.flash_attn_varlen_func


def test_dropout_asks_for_no_attention_matrix():
    """flash-attn 2 would return its (T, T) dropout mask with the flag; the operator is read instead."""
    asked = []

    def func(*args, return_attn_probs=False, dropout_p=0.0, **kwargs):
        asked.append(return_attn_probs)
        return flash_standin.flash_attn_func(*args, **kwargs, return_attn_probs=return_attn_probs)

    model = models.tiny_model("llama", "eager", attention_dropout=0.2).train()
    with flash_standin.installed(model, func), torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(models.tokens(2, 30), use_cache=False)
    assert asked == [False] * 4
    assert set(probe.lse_source.values()) == {"flash-attn"}

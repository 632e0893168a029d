"""flex_attention: ranges and windows are checked against the BlockMasks that transformers builds."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rhythm_kernels import HeadGroups, RhythmProbe

from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

GROUPS = HeadGroups(local=[(0, 0), (0, 3), (1, 1), (3, 2)], global_=[(1, 0), (1, 3), (2, 2), (3, 3)])


@pytest.fixture
def uncompiled():
    """flex_attention compiles itself, 20 s a shape on a CPU; run eagerly it computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def check(family, packed):
    model = models.tiny_model(family, "flex_attention")
    if packed:
        batch, bounds = models.packed_batch()
    else:
        batch = models.padded_batch()
        bounds = padded_bounds(batch["attention_mask"])
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS) as probe:
            assert torch.equal(model(**batch, use_cache=False).logits, plain)
    waad, fai = oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds)
    torch.testing.assert_close(probe.waad.double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=1e-4, rtol=0)
    assert set(probe.lse_source.values()) == {"streamed from q and k"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_families(family, packed, uncompiled):
    check(family, packed)


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed):
    check("mistral", packed)


def test_a_mask_of_the_users_own_is_refused(uncompiled):
    model = models.tiny_model("llama", "flex_attention")
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 40, 40, device="cpu")
    with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(ValueError, match="two-dimensional"):
        model(models.tokens(2, 40), attention_mask=mask)

"""WAAD and FAI of every family and implementation against full eager maps, padded and packed."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe
from rhythm_kernels.integrations.transformers import register

from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

register()
# One head per kv head and layer kind at least; a head may be in both groups.
GROUPS = HeadGroups(local=[(0, 0), (0, 3), (1, 1), (3, 2)], global_=[(1, 0), (1, 3), (2, 2), (3, 3)])
IGNORE_PACKING = {"gpt_oss", "afmoe"}  # they give their masks no positions: packed sequences see each other
EAGER_ONLY = {"gemma2", "gpt_oss"}  # softcap and sinks: transformers refuses or drops them under sdpa
CASES = [
    (family, implementation)
    for family in models.FAMILIES
    for implementation in ("eager", "sdpa", "rhythm")
    if implementation != "sdpa" or family not in EAGER_ONLY
]


def check(probe, expected, tolerance=1e-4):
    waad, fai = expected
    torch.testing.assert_close(probe.waad.double(), waad, atol=tolerance, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=tolerance, rtol=0)
    assert probe.waad.abs().sum() > 0
    assert probe.fai.abs().sum() > 0


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_padded(family, implementation):
    model = models.tiny_model(family, implementation)
    batch = models.padded_batch()
    maps = eager_maps(model, **batch)
    with torch.no_grad():
        plain = model(**batch).logits
        with RhythmProbe(model, GROUPS) as probe:
            logits = model(**batch).logits
    assert torch.equal(logits, plain)
    check(probe, oracle(maps, GROUPS, padded_bounds(batch["attention_mask"])))
    assert implementation != "rhythm" or set(probe.lse_source.values()) == {"rhythm attention"}


@pytest.mark.parametrize(("family", "implementation"), [case for case in CASES if case[0] not in IGNORE_PACKING])
def test_packed(family, implementation):
    model = models.tiny_model(family, implementation)
    batch, bounds = models.packed_batch()
    maps = eager_maps(model, **batch, use_cache=False)
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS) as probe:
            logits = model(**batch, use_cache=False).logits
    assert torch.equal(logits, plain)
    check(probe, oracle(maps, GROUPS, bounds))
    assert implementation != "rhythm" or set(probe.lse_source.values()) == {"rhythm attention"}


@pytest.mark.parametrize(("family", "implementation"), [case for case in CASES if case[0] in IGNORE_PACKING])
def test_models_that_ignore_packing_are_refused(family, implementation):
    model = models.tiny_model(family, implementation)
    batch, _ = models.packed_batch()
    with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(ValueError, match="the batch looks packed"):
        model(**batch, use_cache=False)

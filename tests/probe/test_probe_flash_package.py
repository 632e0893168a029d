"""flash_attention_2 with the flash-attn package itself, interpreted: in the peer environment (tests/peers)."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe
from tests.peers.packages import flash_attn

from . import flash_standin
from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

package = flash_attn()
GROUPS = HeadGroups(local=[(0, 0), (1, 1)], global_=[(0, 2), (1, 3)])


@pytest.mark.parametrize("layout", ["unpadded", "padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_against_eager_maps(family, layout):
    model = models.tiny_model(family, "eager", num_hidden_layers=2)
    if layout == "packed":
        batch, bounds = models.packed_batch()
    else:
        batch = models.padded_batch()
        if layout == "unpadded":
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        bounds = padded_bounds(batch["attention_mask"])
    functions = package.flash_attn_func, package.flash_attn_varlen_func
    with flash_standin.installed(model, *functions), torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS) as probe:
            assert torch.equal(model(**batch, use_cache=False).logits, plain)
    assert set(probe.lse_source.values()) == {"flash-attn" if layout == "unpadded" else "flash-attn (varlen)"}
    waad, fai = oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds)
    torch.testing.assert_close(probe.waad.double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=1e-4, rtol=0)

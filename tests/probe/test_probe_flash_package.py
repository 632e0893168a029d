"""flash_attention_2 with the flash-attn package itself: on a CPU its Triton backend, interpreted.

Collected where `flash_attn` is installed (see conftest.py). The Triton backend's sliding windows and bfloat16 are wrong
in flash-attn 2.8.3 itself and it drops softcap, so these run in float32 and without either.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")  # read when flash_attn is imported

import flash_attn
import flash_attn.flash_attn_interface as interface
import flash_standin
import probe_models as models
import pytest
from probe_oracle import eager_maps, oracle, padded_bounds

from rhythm_kernels import HeadGroups, RhythmProbe

if not torch.cuda.is_available():
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        operator = getattr(interface, f"_flash_attn_{name}")
        operator.register_kernel("cpu")(operator._init_fn)  # the package registers them for CUDA alone

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
    functions = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func
    with flash_standin.installed(model, *functions), torch.no_grad():
        plain = model(**batch, use_cache=False).logits
        with RhythmProbe(model, GROUPS) as probe:
            assert torch.equal(model(**batch, use_cache=False).logits, plain)
    assert set(probe.lse_source.values()) == {"flash-attn" if layout == "unpadded" else "flash-attn (varlen)"}
    waad, fai = oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds)
    torch.testing.assert_close(probe.waad.double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=1e-4, rtol=0)

"""The CUDA band kernels against the dense definitions, a block's threads in several orders."""

from __future__ import annotations

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels import reference
from tests.cases import CASES, Case, _close, check, random_cases

from .emulated import ORDERS, Emulated

MORE = [
    Case("head size one", dim=1, length=30),
    Case("head size 112", dim=112, length=40, dtype=torch.bfloat16),
    Case("head size 192", dim=192, length=33, dtype=torch.float16, heads=2, kv_heads=1),
    Case("head size 256", dim=256, length=41, dtype=torch.bfloat16, heads=3, kv_heads=1, window=30),
    Case("odd head size", dim=13, dtype=torch.bfloat16),
    Case("odd strides", dim=24, dtype=torch.float16, fused=True),
    Case("wide band in chunks", length=300, batch=1, heads=2, kv_heads=1, window=250, horizon=(2, 280), dtype=torch.float16),
    Case("window of a chunk", length=120, batch=1, window=17, dtype=torch.bfloat16, dim=64),
    Case("window past a chunk", length=120, batch=1, window=18, dtype=torch.bfloat16, dim=64),
    Case("more heads than warps", heads=24, kv_heads=3, length=50, dtype=torch.bfloat16, dim=32),
    Case("heads of several groups, shuffled", heads=12, kv_heads=4, length=50, dtype=torch.bfloat16, dim=32,
         options={"heads": [11, 0, 7, 1, 8, 2, 10]}),
    Case("slabs of four", lengths=(130, *(0,) * 560, 200, 1), heads=3, kv_heads=1, dtype=torch.bfloat16, dim=32),
    Case("slabs of two", lengths=(130, *(0,) * 300, 100), heads=5, kv_heads=5),
]  # fmt: skip


@pytest.fixture(params=list(ORDERS))
def order(request: pytest.FixtureRequest, cuda_on_cpu: Emulated) -> str:
    cuda_on_cpu.set_order(request.param, seed=1)
    return request.param


def check_bands(case: Case) -> None:
    """The measures that a known log-sum-exp gives."""
    q, k, options = case.inputs()
    q64, k64 = q.double(), k.double()
    without = {name: x for name, x in options.items() if name not in ("heads", "per_head", "response_start")}
    lse = reference.attention_lse(q64, k64, **without).float()
    if case.lengths is None:  # any strides
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    waad = rk.waad(q, k, lse, window=case.window, backend="cuda", **options)
    want = reference.waad(q64, k64, window=case.window, **options)
    _close("waad", waad, want, 1e-4 * max(1, case.window / 10))
    assert float(waad.min()) >= 0 and float(waad.max()) <= case.window
    if case.horizon[1] is not None:
        fai = rk.fai(q, k, lse, horizon=case.horizon, backend="cuda", **options)
        _close("fai", fai, reference.fai(q64, k64, horizon=case.horizon, **options), 1e-4)
        assert float(fai.min()) >= 0


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_cases(case: Case, order: str) -> None:
    check_bands(case)

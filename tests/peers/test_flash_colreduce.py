"""Causal column sums of flash-colreduce against FAI to the sequence's end and the column means.

Its column s sums `A[t, s]` over the rows `t >= s`: the mean that we give, times their number.
"""

from __future__ import annotations

import pytest
import torch

import rhythm_kernels as rk

from .packages import require

# Below its public function, which takes CUDA tensors alone.
column_sums = require("flash_colreduce.flash")._flash_colreduce

BACKENDS = ["reference", "torch", "cpu", "triton"]
SHAPES = {  # (batch, tokens, heads, head size); its tiles have 64 rows and 64 keys
    "one token": (1, 1, 2, 16),
    "one tile": (2, 64, 2, 16),
    "one past a tile": (1, 65, 2, 64),
    "batch and heads": (2, 70, 3, 32),
    "several tiles": (1, 200, 2, 16),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (torch.randn(2, *shape) * 2).to(dtype)
    return q, k


def peer(q: torch.Tensor, k: torch.Tensor, scale: float, reduction: str = "sum") -> torch.Tensor:
    """`(B, H, T)`."""
    return column_sums(q.transpose(1, 2), k.transpose(1, 2), reduction, True, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_column_sums(shape: tuple[int, ...], backend: str) -> None:
    q, k = inputs(shape)
    sums = peer(q, k, shape[-1] ** -0.5)
    assert sums.max() >= 1
    rows = torch.arange(shape[1], 0, -1)
    for lse in (None, rk.attention_lse(q, k, backend=backend)):
        fai = rk.fai(q, k, lse, horizon=(0, None), per_head=True, backend=backend)
        torch.testing.assert_close(fai * rows, sums, atol=1e-5, rtol=1e-6)
        moments = rk.column_moments(q, k, lse, min_distance=0, per_head=True, backend=backend)
        assert torch.equal(moments.count, rows.expand_as(moments.count).float())
        torch.testing.assert_close(moments.mean * moments.count, sums, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_over_heads_grouped_queries_and_a_scale(backend: str) -> None:
    """It knows no grouped heads: k is repeated for it. What we average over heads, it gives per head."""
    q, _ = inputs((2, 90, 4, 16))
    _, k = inputs((2, 90, 2, 16))
    sums = peer(q, k.repeat_interleave(2, dim=2), 0.4)
    fai = rk.fai(q, k, horizon=(0, None), heads=[3, 0], softmax_scale=0.4, backend=backend)
    want = sums[:, [3, 0]].mean(dim=1) / torch.arange(90, 0, -1)
    torch.testing.assert_close(fai, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend: str) -> None:
    """Its result has the inputs' precision, ours is float32."""
    q, k = inputs((1, 100, 2, 32), torch.float16)
    sums = peer(q, k, 32**-0.5)
    assert sums.dtype == torch.float16
    fai = rk.fai(q, k, horizon=(0, None), per_head=True, backend=backend) * torch.arange(100, 0, -1)
    torch.testing.assert_close(fai, sums.float(), atol=1e-3, rtol=2.0**-10)

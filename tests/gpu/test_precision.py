"""The torch backend against float64 on a CUDA device, while the caller lets float32 products run in TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference
from tests import bounds

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["high", "medium"], autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    assert torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose logits are of the size of ten: TF32 has them wrong by some thousandths."""
    return tuple(3 * torch.randn(1, 700, heads, 64, device="cuda") for heads in (4, 2, 2))


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


def test_products_are_rounded_here() -> None:
    """Else the other tests could not fail."""
    a, b = torch.randn(2, 512, 512, device="cuda")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device has no TF32")
    assert off(a @ b, a.double() @ b.double()) > 1e-3


def test_measures(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, _ = inputs
    q64, k64 = q.double(), k.double()
    lse = reference.attention_lse(q64, k64)
    assert off(rk.attention_lse(q, k, backend="torch"), lse) < 2e-5
    lse = lse.float()
    assert off(rk.waad(q, k, lse, backend="torch"), reference.waad(q64, k64)) < bounds.waad(10)
    assert off(rk.waad(q, k, backend="torch"), reference.waad(q64, k64)) < bounds.waad(10)
    assert off(rk.fai(q, k, lse, backend="torch"), reference.fai(q64, k64)) < 1e-6
    assert off(rk.span(q, k, backend="torch"), reference.span(q64, k64)) < 1e-2
    full = rk.fai(q, k, lse, horizon=(4, None), backend="torch")
    assert off(full, reference.fai(q64, k64, horizon=(4, None))) < 1e-6


def test_attention_and_its_gradients(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    upstream = torch.randn(inputs[0].shape, device="cuda")
    results = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        if dtype == torch.float64:
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))), is_causal=True
            ).transpose(1, 2)
        else:
            out = rk.attention_with_rhythm(q, k, v, backend="torch")[0]
        out.backward(upstream.to(dtype))
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for name, got, want in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert off(got, want) < 2e-5 * max(1.0, float(want.abs().max())), name

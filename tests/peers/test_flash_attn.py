"""flash-attn itself against `attention_with_rhythm` (out, lse, gradients), and our measures from its log-sum-exp."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference
from tests import bounds

from .packages import flash_attn, require

flash = flash_attn()
padding = require("flash_attn.bert_padding")

MEASURES = ["reference", "torch", "cpu", "triton"]
ATTENTION = [None, "torch", "reference", "triton"]


class Shape(NamedTuple):
    length: int
    heads: int
    kv_heads: int
    dim: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    lengths: tuple[int, ...] | None = None  # packed

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = (self.length,) if self.lengths is not None else (self.batch, self.length)
        q = torch.randn(*rows, self.heads, self.dim).to(self.dtype)
        k, v = torch.randn(2, *rows, self.kv_heads, self.dim).to(self.dtype)
        return q, k, v

    @property
    def options(self) -> dict[str, Any]:
        """What our functions are told."""
        cu_seqlens = None if self.lengths is None else torch.tensor([0, *self.lengths]).cumsum(0).int()
        return {"softmax_scale": self.scale, "cu_seqlens": cu_seqlens}

    def peer(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """flash-attn's out, and its lse in our layout: `(B, H, T)`, packed `(H, total)`."""
        rule = {"causal": True, "softmax_scale": self.scale, "return_attn_probs": True}
        if self.lengths is None:
            out, lse, _ = flash.flash_attn_func(q, k, v, **rule)
            return out, lse
        cu_seqlens, longest = self.options["cu_seqlens"], max(self.lengths)
        out, lse, _ = flash.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **rule)
        return out, lse.T  # this backend of flash-attn lays it out as (total, H)


SHAPES = {
    "one token": Shape(1, 2, 1, 16),
    "less than a tile": Shape(21, 2, 2, 32, batch=2),
    "grouped": Shape(70, 4, 2, 32, batch=2),
    "multi-query, several tiles": Shape(150, 3, 1, 16),
    "head size 80": Shape(40, 2, 1, 80),
    "head size 24, own scale": Shape(70, 2, 1, 24, scale=0.5),
    "float16": Shape(70, 4, 2, 32, dtype=torch.float16),
    "packed": Shape(84, 4, 2, 32, lengths=(17, 40, 1, 26)),
    "packed, an empty sequence": Shape(43, 2, 1, 16, lengths=(17, 0, 26)),
    "packed float16": Shape(75, 2, 2, 64, lengths=(70, 5), dtype=torch.float16),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", ATTENTION)
@by_shape
def test_out_lse_and_gradients(shape: Shape, backend: str | None) -> None:
    inputs = shape.inputs()
    ours, peers, exact = leaves(*inputs), leaves(*inputs), leaves(*(x.double() for x in inputs))
    out, lse, stats = rk.attention_with_rhythm(*ours, backend=backend, **shape.options)
    peer_out, peer_lse = shape.peer(*peers)
    exact_out, _, _ = reference.attention_with_rhythm(*exact, **shape.options)
    upstream = torch.randn_like(out)
    for result in (out, peer_out, exact_out):
        result.backward(upstream.to(result.dtype))

    half = shape.dtype == torch.float16
    torch.testing.assert_close(lse, peer_lse, atol=2e-4 if half else 1e-5, rtol=0)
    tolerance = 2.0**-8 if half else 1e-5
    pairs = [(out, peer_out, exact_out), *((a.grad, b.grad, c.grad) for a, b, c in zip(ours, peers, exact))]
    for name, (got, peer, want) in zip(("out", "dq", "dk", "dv"), pairs):
        assert (got - peer).abs().max() <= tolerance * (1 + peer.abs().max()), name
        error, peer_error = ((x.double() - want).abs().max() for x in (got, peer))
        assert error <= 2 * peer_error + 2e-6 * (1 + want.abs().max()), name
    # One pass gives the statistics too: those of the maps that flash-attn's log-sum-exp normalises.
    waad = rk.waad(inputs[0], inputs[1], peer_lse, backend="reference", **shape.options)
    torch.testing.assert_close(stats.waad, waad, atol=5e-4 if half else bounds.waad(10), rtol=0)


@pytest.mark.parametrize("backend", MEASURES)
@by_shape
def test_lse(shape: Shape, backend: str) -> None:
    q, k, v = shape.inputs()
    lse = rk.attention_lse(q, k, backend=backend, **shape.options)
    half = shape.dtype == torch.float16
    torch.testing.assert_close(lse, shape.peer(q, k, v)[1], atol=2e-4 if half else 1e-5, rtol=0)


@pytest.mark.parametrize("backend", MEASURES)
@by_shape
def test_measures_from_its_lse(shape: Shape, backend: str) -> None:
    """What a caller of flash-attn does; the dense definition knows q and k alone."""
    q, k, v = shape.inputs()
    lse = shape.peer(q, k, v)[1]
    exact = q.double(), k.double()
    half = shape.dtype == torch.float16
    for per_head in (False, True):
        options = {**shape.options, "per_head": per_head}
        got = rk.waad(q, k, lse, backend=backend, **options)
        want = reference.waad(*exact, **options)
        torch.testing.assert_close(got.double(), want, atol=1e-3 if half else bounds.waad(10), rtol=0)
        for horizon in ((2, 9), (0, None)):
            got = rk.fai(q, k, lse, horizon=horizon, backend=backend, **options)
            want = reference.fai(*exact, horizon=horizon, **options)
            torch.testing.assert_close(got.double(), want, atol=bounds.fai(), rtol=0)


@pytest.mark.parametrize("backend", ATTENTION)
def test_padded_batch(backend: str | None) -> None:
    """Padding on either side: flash-attn unpads and packs the batch, ours is given its ranges."""
    q, k, v = Shape(50, 4, 2, 16, batch=3).inputs()
    start, end = torch.tensor([0, 13, 4], dtype=torch.int32), torch.tensor([50, 50, 31], dtype=torch.int32)
    position = torch.arange(50)
    live = (position >= start[:, None]) & (position < end[:, None])
    packed, index, cu_seqlens, longest, _ = padding.unpad_input(q, live)
    rest = [padding.unpad_input(x, live)[0] for x in (k, v)]
    peer, peer_lse, _ = flash.flash_attn_varlen_func(
        packed, *rest, cu_seqlens, cu_seqlens, longest, longest, causal=True, return_attn_probs=True
    )
    out, lse, _ = rk.attention_with_rhythm(q, k, v, seq_start=start, seq_end=end, backend=backend)
    torch.testing.assert_close(out, padding.pad_input(peer, index, 3, 50), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.transpose(1, 2)[live], peer_lse, atol=1e-5, rtol=0)

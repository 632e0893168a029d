"""What callers of flash-attn, NumPy and trainers hold in their hands is taken, and means the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference

from .backends import ATTENDING, BANDED, CREDITING, MEASURING, backend, bands, credit, cuda_on_cpu, device_of

__all__ = ["backend", "bands", "cuda_on_cpu"]  # fixtures

TOTAL, LIVE = 30, 26


class Index:
    """What is no int and yet stands for one."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


INTEGERS: dict[str, Callable[[int], Any]] = {
    "NumPy": np.int64,
    "unsigned NumPy": np.uint8,
    "an array of one": np.array,
    "__index__": Index,
    "a tensor": torch.tensor,
    "a tensor of 32 bits": lambda n: torch.tensor(n, dtype=torch.int32),
}


def drawn(backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.to(device_of(backend)) for x in (torch.randn(TOTAL, n, 16) for n in (4, 2, 2)))  # type: ignore[return-value]


def bounds_of(q: Tensor, *more: int) -> Tensor:
    return torch.tensor([0, 10, LIVE, *more], dtype=torch.int32, device=q.device)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_integers_of_any_kind(backend: str, kind: str) -> None:
    q, k, _ = drawn(backend)
    n, options = INTEGERS[kind], {"cu_seqlens": bounds_of(q, TOTAL), "backend": backend}
    lse = rk.attention_lse(q, k, **options)
    for got, want in [
        (rk.waad(q, k, lse, window=n(6), max_seqlen=n(16), **options), rk.waad(q, k, lse, window=6, **options)),
        (rk.fai(q, k, lse, horizon=(n(1), n(5)), **options), rk.fai(q, k, lse, horizon=(1, 5), **options)),
        (rk.span(q, k, window_size=(n(4), 0), **options), rk.span(q, k, window_size=(4, 0), **options)),
        (rk.span(q, k, heads=[n(3), n(0)], **options), rk.span(q, k, heads=[3, 0], **options)),
        (rk.column_moments(q, k, min_distance=n(3), **options), rk.column_moments(q, k, min_distance=3, **options)),
    ]:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


NO_INTEGERS = [
    np.True_, np.float32(3), np.array([3, 4]), torch.tensor(3.0), torch.tensor([3, 4]), torch.tensor(True), "3", None,
    3.0, torch.empty((), dtype=torch.int64, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_by_name(value: Any) -> None:
    q, k, _ = drawn("cpu")
    with pytest.raises(TypeError, match="window must be an int, got"):
        rk.waad(q[None], k[None], window=value)
    with pytest.raises(TypeError, match=r"horizon\[0\] must be an int, got"):
        rk.fai(q[None], k[None], horizon=(value, 9))
    with pytest.raises(TypeError, match="heads must be integers, got"):
        rk.waad(q[None], k[None], heads=[value])
    if value is not None and getattr(value, "device", q.device) == q.device:
        with pytest.raises(TypeError, match="max_seqlen must be an int, got"):
            rk.waad(q, k, cu_seqlens=bounds_of(q), max_seqlen=value)


def test_a_max_seqlen_that_the_host_cannot_read_counts_as_not_given() -> None:
    """On another device than the CPU, where it would have to wait for it."""
    q, k, _ = drawn("cpu")
    longest = torch.empty((), dtype=torch.int32, device="meta")
    assert torch.equal(
        rk.waad(q, k, cu_seqlens=bounds_of(q), max_seqlen=longest), rk.waad(q, k, cu_seqlens=bounds_of(q))
    )
    with pytest.raises(TypeError, match=r"max_seqlen must be an int, got a tensor of torch\.float32"):
        rk.waad(q, k, cu_seqlens=bounds_of(q), max_seqlen=longest.float())


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, int], ids=lambda x: x.__name__)
def test_numbers_of_any_kind(number: Callable[[float], Any]) -> None:
    q, k, _ = drawn("cpu")
    want = rk.span(q[None], k[None], softmax_scale=2.0, softcap=4.0)
    assert torch.equal(rk.span(q[None], k[None], softmax_scale=number(2), softcap=number(4)), want)
    measures = torch.rand(2, 9), torch.rand(2, 9), torch.ones(2, 9)
    want = rk.rhythm_credit(*measures, gamma_amp=2.0, alpha=1.0, top=1.0, tau_waad=1.0, neighbors=2)
    given = {name: number(1) for name in ("alpha", "top", "tau_waad")} | {"gamma_amp": number(2)}
    assert torch.equal(rk.rhythm_credit(*measures, **given, neighbors=np.int64(2)), want)


@pytest.mark.parametrize("heads", [lambda: {0, 3}, lambda: {0: "a", 3: "b"}, lambda: (h for h in (0, 3)),
                                   lambda: range(0, 4, 3), lambda: np.array([0, 3])],
                         ids=["set", "dict", "generator", "range", "array"])  # fmt: skip
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_heads_by_any_iterable(backend: str, heads: Callable[[], Any]) -> None:
    q, k, _ = (x[None] for x in drawn(backend))
    lse = reference.attention_lse(q, k)
    for per_head in (False, True):
        options = {"per_head": per_head, "backend": backend}
        assert torch.equal(rk.waad(q, k, lse, heads=heads(), **options), rk.waad(q, k, lse, heads=[0, 3], **options))
        assert torch.equal(rk.fai(q, k, lse, heads=heads(), **options), rk.fai(q, k, lse, heads=[0, 3], **options))


# Buffers of a fixed size: `cu_seqlens` ends before the total, and what lies behind is padding, whatever it holds.


@pytest.mark.parametrize("more", [(), (LIVE, LIVE)], ids=["", "repeated end"])
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_tokens_after_the_last_sequence(backend: str, more: tuple[int, ...]) -> None:
    q, k, _ = drawn(backend)
    lse = torch.zeros(4, TOTAL, device=q.device)
    live = q[:LIVE].clone(), k[:LIVE].clone()
    lse[:, :LIVE] = reference.attention_lse(*live, cu_seqlens=bounds_of(q))
    for x in (q, k):
        x[LIVE:] = float("nan")
    lse[:, LIVE:] = float("nan")
    options = {"cu_seqlens": bounds_of(q, *more), "backend": backend}
    for measure in (rk.waad, rk.fai):
        got = measure(q, k, lse, **options)
        torch.testing.assert_close(got[:LIVE], measure(*live, lse[:, :LIVE], **options), rtol=0, atol=1e-6)
        assert torch.equal(got[LIVE:], torch.zeros(TOTAL - LIVE, device=q.device))


@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_streamed_measures_of_tokens_after_the_last_sequence(backend: str) -> None:
    q, k, _ = drawn(backend)
    live = q[:LIVE].clone(), k[:LIVE].clone()
    q[LIVE:] = k[LIVE:] = float("nan")
    options = {"cu_seqlens": bounds_of(q), "backend": backend}
    same = {"rtol": 0, "atol": 1e-6}
    got = rk.attention_lse(q, k, **options)
    torch.testing.assert_close(got[:, :LIVE], rk.attention_lse(*live, **options), **same)
    assert (got[:, LIVE:] == -torch.inf).all()
    for name in ("span", "column_moments"):
        got, want = (getattr(rk, name)(*x, **options) for x in ((q, k), live))
        for a, b in zip(got, want) if name == "column_moments" else [(got, want)]:
            torch.testing.assert_close(a[:LIVE], b, **same)
            assert not a[LIVE:].any()


@pytest.mark.parametrize("backend", ATTENDING, indirect=True)
def test_attention_of_tokens_after_the_last_sequence(backend: str) -> None:
    """`out` is 0 there, `lse` -inf, and no gradient comes from or goes to them."""
    qkv = drawn(backend)
    live = [x[:LIVE].clone().requires_grad_() for x in qkv]
    whole = [x.requires_grad_() for x in qkv]
    options = {"cu_seqlens": bounds_of(qkv[0]), "backend": backend}
    (got, got_lse, stats), (want, want_lse, want_stats) = (
        rk.attention_with_rhythm(*x, **options) for x in (whole, live)
    )
    same = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(got[:LIVE], want, **same)
    torch.testing.assert_close(got_lse[:, :LIVE], want_lse, **same)
    torch.testing.assert_close(stats.waad[:LIVE], want_stats.waad, **same)
    assert not got[LIVE:].any() and (got_lse[:, LIVE:] == -torch.inf).all() and not stats.span[LIVE:].any()
    upstream = torch.randn_like(got)
    dead = upstream.clone()
    dead[LIVE:] = 1e9
    grads = torch.autograd.grad(got, whole, dead)
    for a, b in zip(grads, torch.autograd.grad(want, live, upstream[:LIVE]), strict=True):
        torch.testing.assert_close(a[:LIVE], b, **same)
        assert not a[LIVE:].any()


# The rest of a caller's surroundings.


@pytest.mark.parametrize("backend", CREDITING, indirect=True)
def test_credit_under_another_default_device(backend: str) -> None:
    measures = torch.rand(3, 20), torch.rand(3, 20), torch.ones(3, 20)
    options = {"tau_waad": 0.3, "tau_delta": 0.2}
    want = credit(backend, *measures, **options)
    with torch.device("meta"):
        got = credit(backend, *measures, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_measures_under_another_default_device(backend: str) -> None:
    q, k, _ = drawn(backend)
    options = {"cu_seqlens": bounds_of(q), "heads": [3, 1], "backend": backend}
    want = rk.column_moments(q, k, **options), rk.waad(q, k, **options)
    with torch.device("meta"):
        got = rk.column_moments(q, k, **options), rk.waad(q, k, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_dense_attention_computes_in_float64() -> None:
    """As every dense measure does: the definition, rounded once to the types that all backends give."""
    q, k, v = (x[None].requires_grad_() for x in drawn("cpu"))
    out, lse, stats = rk.attention_with_rhythm(q, k, v, backend="reference")
    assert {x.dtype for x in (out, lse, *stats)} == {torch.float32} and not lse.requires_grad
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse, want_stats = reference.attention_with_rhythm(*wide)
    for got, exact in ((out, want), (lse, want_lse), (stats.waad, want_stats.waad), (stats.span, want_stats.span)):
        assert torch.equal(got, exact.float())
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(want, wide, upstream.double())
    for got, exact in zip(torch.autograd.grad(out, (q, k, v), upstream), grads, strict=True):
        assert torch.equal(got, exact.float())
    out, lse, _ = rk.attention_with_rhythm(*wide, backend="reference")
    assert out.dtype == torch.float64 and torch.equal(out, want) and torch.equal(lse, want_lse.float())

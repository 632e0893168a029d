"""What is not finite in `lse` and in sinks: one answer on every backend, which gamma then sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference

from .backends import ATTENDING, BANDED, CREDITING, MEASURING, backend, bands, credit, cuda_on_cpu, device_of

__all__ = ["backend", "bands", "cuda_on_cpu"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")  # Triton's

B, T, H, D = 2, 26, 2, 16
ROW, HEAD = 14, 1
INF, NAN = math.inf, math.nan
# Functions that read a given lse; their options.
READ_LSE: dict[str, dict[str, Any]] = {
    "waad": {"window": 4}, "fai": {"horizon": (2, 7)}, "fai, open": {"horizon": (2, None)},
    "column_moments": {"min_distance": 2},
}  # fmt: skip
READING = [(name, each) for name in READ_LSE for each in (BANDED if name in ("waad", "fai") else MEASURING)]


def drawn(device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(B, T, H, D, device=device), torch.randn(B, T, 1, D, device=device)
    return q, k, reference.attention_lse(q, k)


def measured(name: str, backend: str, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    options = READ_LSE.get(name, {}) | options
    result = getattr(rk, name.partition(",")[0])(*tensors, backend=backend, per_head=True, **options)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize(("name", "backend"), READING, indirect=["backend"])
@pytest.mark.parametrize("left", [-1, 5])
def test_an_lse_that_is_not_finite(left: int, name: str, backend: str, value: float) -> None:
    """NaN in the row and in the columns that it counts for and sees, of its head alone; all else as it was."""
    q, k, lse = drawn(device_of(backend))
    lse = reference.attention_lse(q, k, window_size=(left, 0))
    bad = lse.clone()
    bad[0, HEAD, ROW] = value
    before = measured(name, backend, q, k, lse, window_size=(left, 0))
    after = measured(name, backend, q, k, bad, window_size=(left, 0))
    t = torch.arange(T, device=q.device)
    touched = torch.zeros(B, H, T, dtype=torch.bool, device=q.device)
    last = min(7 if name == "fai" else T, left if left >= 0 else T)
    touched[0, HEAD] = t == ROW if name == "waad" else (t >= ROW - last) & (t <= ROW - 2)
    names = ("count", "mean", "variance", "skewness", "kurtosis") if name == "column_moments" else (name,)
    for each, a, b in zip(names, before, after, strict=True):
        assert a.isfinite().all()
        its = touched & False if each == "count" else touched
        assert b[its].isnan().all(), each
        torch.testing.assert_close(b[~its], a[~its], msg=lambda text, each=each: f"{each}: {text}")


@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_too_few_rows_have_no_variance_whatever_their_lse(backend: str) -> None:
    q, k, lse = drawn(device_of(backend))
    lse[..., -1] = INF
    moments = rk.column_moments(q, k, lse, min_distance=2, backend=backend)
    one = T - 3  # the last row alone counts for it
    assert (moments.count[:, one] == 1).all() and moments.mean[:, one].isnan().all()
    assert not torch.stack(moments[2:])[..., one].any()
    assert not torch.stack(moments)[..., T - 2 :].any()


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize(("name", "backend"), READING, indirect=["backend"])
def test_rows_that_are_not_live_stay_zero(name: str, backend: str, value: float) -> None:
    q, k, _ = drawn(device_of(backend))
    ranges = {"seq_start": torch.tensor([3, 0]), "seq_end": torch.tensor([T - 4, T])}
    ranges = {each: x.to(q.device) for each, x in ranges.items()}
    lse = reference.attention_lse(q, k, **ranges)
    response = torch.tensor([6, 5], device=q.device)
    t = torch.arange(T, device=q.device)
    live = (t >= response[:, None]) & (t < ranges["seq_end"][:, None])
    bad = torch.where(live[:, None], lse, value)
    good = torch.where(live[:, None], lse, 0.0)
    given = ranges | {"response_start": response}
    for a, b in zip(measured(name, backend, q, k, bad, **given), measured(name, backend, q, k, good, **given)):
        assert torch.equal(a, b)
        assert not a[~live[:, None].expand_as(a)].any()


@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("backend", BANDED, indirect=True)
def test_gamma_is_one_for_such_a_response(backend: str, value: float) -> None:
    q, k, lse = drawn(device_of(backend))
    lse[0, HEAD, ROW] = value
    waad, fai = (rk.waad(q, k, lse, backend=backend), rk.fai(q, k, lse, horizon=(2, 7), backend=backend))
    mask = torch.ones(B, T, dtype=torch.bool)
    for each in CREDITING:
        if each != "cuda" and rk.backends()[each]:
            continue
        for mode in ("local", "global", "coupled"):
            gamma = credit(each, waad.cpu(), fai.cpu(), mask, mode=mode)
            assert (gamma[0] == 1).all(), (each, mode)
            assert (gamma[1] != 1).any(), (each, mode)
    # Outside of the response mask it is nobody's.
    mask[0, ROW - 7 : ROW + 1] = False
    assert (rk.rhythm_credit(waad.cpu(), fai.cpu(), mask)[0] != 1).any()


SINKS = torch.tensor([0.5, 0.0])


def with_sink(value: float, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    sinks = SINKS.to(device, dtype, copy=True)
    sinks[HEAD] = value
    return sinks


@pytest.mark.parametrize("value", [INF, NAN, -INF], ids=str)
@pytest.mark.parametrize(
    ("given", "name", "backend"),
    [(True, *row) for row in READING]
    + [(False, name, each) for name in (*READ_LSE, "span", "attention_lse") for each in MEASURING],
    indirect=["backend"],
)
def test_a_sink_that_is_not_finite(given: bool, name: str, backend: str, value: float) -> None:
    """`-inf`: none. `+inf` or NaN: all of its head is NaN, also beside a finite lse; other heads are as they were."""
    q, k, _ = drawn(device_of(backend))
    sinks, none = with_sink(value, str(q.device)), with_sink(-1e30, str(q.device))
    lse = [reference.attention_lse(q, k, sinks=none)] if given else []

    def results(sinks: Tensor) -> tuple[Tensor, ...]:
        if name == "attention_lse":
            return (rk.attention_lse(q, k, sinks=sinks, backend=backend),)
        return measured(name, backend, q, k, *lse, sinks=sinks)

    for i, (a, b) in enumerate(zip(results(none), results(sinks), strict=True)):
        torch.testing.assert_close(b[:, 1 - HEAD], a[:, 1 - HEAD])
        if value == -INF or (name == "column_moments" and i == 0):
            torch.testing.assert_close(b, a)
            continue
        some = a[:, HEAD] != 0
        if name == "waad":
            some |= True  # the first token's too, which is at no distance from any
        assert b[:, HEAD][some].isnan().all()


@pytest.mark.parametrize("value", [INF, NAN, -INF], ids=str)
@pytest.mark.parametrize("backend", ATTENDING, indirect=True)
def test_attention_with_a_sink_that_is_not_finite(backend: str, value: float) -> None:
    q, k, _ = drawn(device_of(backend))
    sinks, none = with_sink(value, str(q.device)), with_sink(-1e30, str(q.device))

    def results(sinks: Tensor) -> list[Tensor]:
        """By head: out, lse, WAAD, span and the gradient of q."""
        leaf = q.clone().requires_grad_()
        out, lse, stats = rk.attention_with_rhythm(leaf, k, k, sinks=sinks, per_head=True, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        return [out.detach().transpose(1, 2), lse, *stats, gradient.transpose(1, 2)]

    for a, b in zip(results(none), results(sinks), strict=True):
        torch.testing.assert_close(b[:, 1 - HEAD], a[:, 1 - HEAD])
        if value == -INF:
            torch.testing.assert_close(b, a)
        else:
            assert b[:, HEAD].isnan().all()


@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_a_sink_beyond_float32_is_infinite(backend: str) -> None:
    q, k, _ = drawn(device_of(backend))
    sinks = with_sink(1e300, str(q.device), torch.float64)
    assert rk.attention_lse(q, k, sinks=sinks, backend=backend)[:, HEAD].isnan().all()
    assert rk.fai(q, k, horizon=(0, 3), sinks=sinks, backend=backend, per_head=True)[:, HEAD].isnan().all()


@pytest.mark.parametrize("backend", MEASURING, indirect=True)
def test_logits_that_are_all_infinite(backend: str) -> None:
    """A computed lse is -inf where every logit is, NaN where one is +inf; the measures are NaN beside either."""
    device = device_of(backend)
    k = torch.ones(1, 9, 1, 1, device=device)
    for value, kind in ((INF, torch.isnan), (-INF, torch.isneginf)):
        q = torch.ones(1, 9, 1, 1, device=device)
        q[0, 5] = value
        lse = rk.attention_lse(q, k, backend=backend)
        assert kind(lse[0, 0, 5])
        fai = rk.fai(q, k, horizon=(1, 2), backend=backend)
        waad, span = rk.waad(q, k, backend=backend), rk.span(q, k, backend=backend)
        assert waad[0].isnan().tolist() == span[0].isnan().tolist() == [t == 5 for t in range(9)]
        assert fai[0].isnan().tolist() == [t in (3, 4) for t in range(9)]
        if backend in ATTENDING:
            out, lse, stats = rk.attention_with_rhythm(q, k, k, backend=backend)
            assert out[0, :, 0, 0].isnan().tolist() == stats.waad[0].isnan().tolist() == [t == 5 for t in range(9)]
            assert kind(lse[0, 0, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ATTENDING, indirect=True)
def test_attention_of_a_query_or_key_that_is_not_a_number(backend: str, dtype: torch.dtype) -> None:
    """torch's CPU flash operator alone makes 0 of such a row, and an lse of 0."""
    device = device_of(backend)
    q, k, v = (torch.randn(1, 9, heads, 16, dtype=dtype, device=device) for heads in (2, 1, 1))
    for x, at in ((q, (0, 5, 1)), (k, (0, 0))):
        clean, value = rk.attention_with_rhythm(q, k, v, backend=backend), x[at].clone()
        x[at] = NAN
        out, lse, _ = rk.attention_with_rhythm(q, k, v, backend=backend)
        x[at] = value
        bad = torch.zeros(2, 9, dtype=torch.bool, device=device)
        bad[:, :] = x is k
        bad[1, 5] = True
        assert torch.equal(lse[0].isnan(), bad) and torch.equal(out[0].isnan().all(-1).T, bad)
        torch.testing.assert_close(out[0][~bad.T], clean[0][0][~bad.T])

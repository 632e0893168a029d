"""Every backend, every case: the measures against the dense float64 definition."""

from __future__ import annotations

import inspect

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels import reference
from rhythm_kernels.reference.formulas import logits

from .cases import CASES, Case, check, random_cases

# Backends that can be forced on CPU tensors here; Triton's interpreter has its own, smaller runs in tests/triton.
BACKENDS = [name for name in ("torch", "cpu", "reference") if not rk.backends()[name]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned_memory")
def test_case(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(seed: int, backend: str) -> None:
    for case in random_cases(seed, 8):
        try:
            check(case, backend)
        except AssertionError as error:
            raise AssertionError(f"{case}") from error


@pytest.mark.parametrize("function", [rk.waad, rk.fai, rk.RhythmProbe, reference.waad, reference.fai])
def test_defaults_are_those_of_the_method(function) -> None:
    """W = 10 and H = [10, 100], as the paper's second version trains; longer than most cases here, so asked for."""
    method = {"window": 10, "horizon": (10, 100)}
    stated = {n: p.default for n, p in inspect.signature(function).parameters.items() if n in method}
    assert stated
    assert stated == {name: method[name] for name in stated}


def test_the_default_backend_serves_the_cpu() -> None:
    check(CASES[0], None)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("magnitude", [10.0, 1e4])
def test_large_logits(backend: str, magnitude: float) -> None:
    """Finite, and within what a float32 log-sum-exp allows: `W max|x| 2^-22`."""
    q, k, _ = Case("large", length=120, dim=16).inputs()
    x = logits(q[0].double(), k[0].double())
    q = q * (magnitude / x[x.isfinite()].abs().max())
    bound = magnitude * 2.0**-22 + 1e-6
    lse = rk.attention_lse(q, k, backend=backend)
    waad = rk.waad(q, k, lse, backend=backend)
    fai = rk.fai(q, k, lse, backend=backend)
    assert waad.isfinite().all()
    assert (waad - reference.waad(q.double(), k.double())).abs().max() < 10 * bound
    assert (fai - reference.fai(q.double(), k.double())).abs().max() < bound
    # The row pass's own arithmetic subtracts the row's largest logit, and does far better.
    span = rk.span(q, k, backend=backend)
    assert (span - reference.span(q.double(), k.double())).abs().max() < 120 * bound


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_rows_and_columns(backend: str, poison: float) -> None:
    q, k, _ = Case("poison", batch=2, length=80).inputs()
    lse = rk.attention_lse(q, k, backend=backend)
    clean_waad, clean_fai = rk.waad(q, k, lse, backend=backend), rk.fai(q, k, lse, backend=backend)
    bad_q = q.clone()
    bad_q[0, 40] = poison
    waad, fai = rk.waad(bad_q, k, lse, backend=backend), rk.fai(bad_q, k, lse, backend=backend)
    assert not torch.isfinite(waad[0, 40])
    rows = torch.ones(80, dtype=torch.bool)
    rows[40] = False
    torch.testing.assert_close(waad[:, rows], clean_waad[:, rows])
    torch.testing.assert_close(waad[1], clean_waad[1])
    columns = torch.ones(80, dtype=torch.bool)
    columns[:31] = False  # row 40 is in T(s) of s = 0..30
    torch.testing.assert_close(fai[0, columns], clean_fai[0, columns])
    bad_k = k.clone()
    bad_k[0, 40] = float("nan")
    waad, span = rk.waad(q, bad_k, lse, backend=backend), rk.span(q, bad_k, backend=backend)
    assert waad[0, 40:50].isnan().all()
    torch.testing.assert_close(waad[0, 50:], clean_waad[0, 50:])
    assert span[0, 40:].isnan().all()
    torch.testing.assert_close(span[0, :40], rk.span(q, k, backend=backend)[0, :40])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_detached_and_free_of_autocast(backend: str) -> None:
    q, k, _ = CASES[0].inputs()
    plain = rk.waad(q, k, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = rk.waad(q.requires_grad_(), k, backend=backend)
    assert not mixed.requires_grad
    assert torch.equal(plain, mixed)


def test_repeated_calls_are_bit_equal() -> None:
    q, k, options = CASES[0].inputs()
    first = rk.fai(q, k, **options)
    assert all(torch.equal(first, rk.fai(q, k, **options)) for _ in range(20))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_of_the_default(case: Case) -> None:
    """On a CPU torch's own attention, and the row pass beside it."""
    check(case, None, passes=("attention",))


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("window", [70, 10**6, 2**40])
def test_a_window_beyond_the_length_is_the_span(backend: str | None, window: int) -> None:
    q, k, _ = Case("plain").inputs()
    span = reference.span(q.double(), k.double())
    for lse in (None, rk.attention_lse(q, k)):
        waad = rk.waad(q, k, lse, window=window, backend=backend)
        torch.testing.assert_close(waad.double(), span, atol=1e-3, rtol=0)


def test_the_second_derivative_is_refused() -> None:
    q, k, _ = Case("plain", length=12).inputs()
    out, _, _ = rk.attention_with_rhythm(q.requires_grad_(), k, k)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_a_batch_without_a_live_row_has_gradients_of_zero(backend: str | None) -> None:
    """A rank whose share of a batch is padding alone goes backward with the others."""
    leaves = [torch.full((2, 5, 1, 4), float("nan"), requires_grad=True) for _ in range(3)]
    nothing = torch.tensor([3, 3], dtype=torch.int32)
    out, _, _ = rk.attention_with_rhythm(*leaves, seq_start=nothing, seq_end=nothing, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert torch.equal(gradient, torch.zeros_like(gradient))

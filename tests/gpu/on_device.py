"""What must hold on a GPU, as functions of the device: what can run on a CPU as well is rehearsed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rhythm_kernels as rk
from benchmarks.gate import AttentionGate
from benchmarks.problem import AttentionProblem
from benchmarks.shapes import AttentionShape
from rhythm_kernels import ops, reference
from rhythm_kernels.credit import CREDIT_MODES
from tests import bounds
from tests.cases import Case, check

Device = torch.device | str
PASSES = ("band_rows", "band_columns", "row_stats", "column_stats", "attention")


def lacks(backend: str, device: Device, *passes: str) -> str:
    """ "" where the backend runs all of `passes` on the device, else why not."""
    for name in passes:
        try:
            ops.choose(name, backend, torch.device(device))
        except ValueError as error:
            return str(error)
    return ""


def check_bands(case: Case, backend: str, device: Device) -> None:
    """WAAD and FAI given the log-sum-exp: for a backend that has the band passes alone."""
    q, k, options = case.inputs(device)
    rule = {name: x for name, x in options.items() if name not in ("heads", "per_head", "response_start")}
    lse = reference.attention_lse(q.double(), k.double(), **rule).float()
    waad = rk.waad(q, k, lse, window=case.window, backend=backend, **options)
    want = reference.waad(q.double(), k.double(), window=case.window, **options)
    assert (waad.double() - want).abs().max() < bounds.waad(case.window)
    if case.horizon[1] is not None:
        fai = rk.fai(q, k, lse, horizon=case.horizon, backend=backend, **options)
        want = reference.fai(q.double(), k.double(), horizon=case.horizon, **options)
        assert (fai.double() - want).abs().max() < bounds.fai()


def check_case(case: Case, backend: str, device: Device) -> None:
    """The case list's own check, or that of the bands where the backend has no more."""
    if lacks(backend, device, "row_stats", "column_stats"):
        check_bands(case, backend, device)
    else:
        check(case, backend, device)


def value_size(case: Case) -> int:
    """The head size of v: that of q and k, but for 192, where multi-head latent attention has 128."""
    return 128 if case.dim == 192 else case.dim


def check_attention(case: Case, backend: str | None, device: Device) -> None:
    """`out`, its gradients and the statistics against float64: twice the error of float32 PyTorch, and rounding."""
    q, k, options = case.inputs(device)
    size = value_size(case)
    v = torch.randn(*k.shape[:-1], size, generator=torch.Generator().manual_seed(1)).to(k)
    upstream = torch.randn(*q.shape[:-1], size, generator=torch.Generator().manual_seed(2)).to(q)

    def run(function: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        extra = {} if function is reference.attention_with_rhythm else {"backend": backend}
        out, lse, stats = function(*inputs, window=case.window, **options, **extra)
        grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
        return out.detach(), lse, stats.waad, stats.span, *grads

    want = run(reference.attention_with_rhythm, torch.float64)
    dense = run(reference.attention_with_rhythm, torch.float32)
    got = run(rk.attention_with_rhythm, q.dtype)
    for name, g, w, d in zip(("out", "lse", "waad", "span", "dq", "dk", "dv"), got, want, dense):
        finite = w.isfinite()
        error = (g.double() - w)[finite].abs().max()
        rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[g.dtype]
        rounding = 1e-4 if name in ("lse", "waad", "span") else rounding
        bound = 2 * (d.double() - w)[finite].abs().max() + rounding * max(1.0, float(w[finite].abs().max()))
        assert error < bound, f"{name}: {float(error):.3g}, at most {float(bound):.3g}"


def measures(backend: str, bands_alone: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """All that a backend measures, as one function of q, k and lse."""

    def run(q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        bands = rk.waad(q, k, lse, backend=backend), rk.fai(q, k, lse, backend=backend)
        if bands_alone:
            return bands
        full = rk.fai(q, k, lse, horizon=(10, None), backend=backend)
        span, moments = rk.span(q, k, backend=backend), rk.column_moments(q, k, lse, backend=backend)
        return *bands, full, span, rk.attention_lse(q, k, backend=backend), *moments

    return run


def measured_inputs(device: Device, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    case = Case("captured", length=130, heads=4, kv_heads=2, dim=32, dtype=dtype, seed=seed)
    q, k, _ = case.inputs(device)
    return q, k, reference.attention_lse(q, k)


def check_compiled(backend: str, device: Device, how: dict[str, Any]) -> None:
    """`torch.compile(fullgraph=True)` gives the same numbers, also for a second length."""
    bands_alone = bool(lacks(backend, device, "row_stats", "column_stats"))
    run = measures(backend, bands_alone)
    compiled = torch.compile(run, fullgraph=True, **how)
    q, k, lse = measured_inputs(device)
    for length in (130, 130, 67):
        part = q[:, :length], k[:, :length], lse[..., :length]
        for got, want in zip([x.clone() for x in compiled(*part)], run(*part)):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def check_repeatable(backend: str, device: Device, times: int) -> None:
    """The same bits every time."""
    run = measures(backend, bool(lacks(backend, device, "row_stats", "column_stats")))
    inputs = measured_inputs(device, dtype=torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    first = run(*inputs)
    for _ in range(times):
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs), first))


def check_long(backend: str, device: Device, shape: AttentionShape) -> None:
    """WAAD and FAI of a long sequence, its first and last tokens against float64."""
    problem = AttentionProblem.draw(shape, torch.device(device))
    waad = rk.waad(problem.q, problem.k, problem.lse, window=shape.window, backend=backend)
    fai = rk.fai(problem.q, problem.k, problem.lse, horizon=(shape.lo, shape.hi), backend=backend)
    error, where = AttentionGate(problem).error({"waad": waad, "fai": fai})
    assert error < 1, f"{where}: {error:.3g} times the tolerance"


def credit_inputs(device: Device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    waad, fai = 10 * torch.rand(8, 200, generator=generator), torch.rand(8, 200, generator=generator)
    mask = torch.rand(8, 200, generator=generator) > 0.2
    return waad.to(device), fai.to(device), mask.to(device)


def check_credit(backend: str | None, device: Device) -> None:
    """Gamma bit for bit the token loop's: every mode, single and double precision, and a long response."""
    one_long = [x.reshape(1, -1) for x in credit_inputs(device, 1)]
    one_long = [x.repeat(1, 20) for x in one_long]
    for dtype in (torch.float32, torch.float64):
        for inputs, modes in ((credit_inputs(device, 0), CREDIT_MODES), (one_long, ("coupled",))):
            waad, fai, mask = inputs[0].to(dtype), inputs[1].to(dtype), inputs[2]
            for mode in modes:
                for options in ({}, {"bottom": True}, {"neighbors": 7, "tau_waad": 6.0, "tau_delta": 0.1}):
                    generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
                    got = rk.rhythm_credit(
                        waad, fai, mask, mode, entropy=fai, generator=generators[0], backend=backend, **options
                    )
                    want = reference.rhythm_credit(
                        waad.cpu(), fai.cpu(), mask.cpu(), mode, entropy=fai.cpu(), generator=generators[1], **options
                    )
                    assert torch.equal(got.cpu(), want), (dtype, mode, options)

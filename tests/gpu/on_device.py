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
from rhythm_kernels.settings import CREDIT_MODES

from ..cases import PASSES, Case, check

Device = torch.device | str


def lacks(backend: str, device: Device, *passes: str) -> str:
    """ "" where the backend runs all of `passes` on the device, else why not."""
    for name in passes:
        try:
            ops.choose(name, backend, torch.device(device))
        except ValueError as error:
            return str(error)
    return ""


def check_case(case: Case, backend: str, device: Device) -> None:
    """The case list's own check, of all passes that the backend has."""
    check(case, backend, device, tuple(name for name in PASSES if not lacks(backend, device, name)))


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

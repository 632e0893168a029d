"""Credit: ours, one contender a backend, and the readable loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

import rhythm_kernels as rk

from ..gate import Results
from ..problem import CreditProblem

Call = Callable[[], Results]
GATED_ROWS = 16


def ours(backend: str) -> Callable[[CreditProblem], Call]:
    return lambda p: lambda: {"gamma": rk.rhythm_credit(p.waad, p.fai, p.mask, backend=backend)}


def loop(p: CreditProblem) -> Call:
    return lambda: {"gamma": rk.reference.rhythm_credit(p.waad, p.fai, p.mask)}


class CreditGate:
    """Bit for bit the loop's gamma, on the first responses."""

    def __init__(self, problem: CreditProblem) -> None:
        self.problem = problem

    def error(self, got: Results) -> tuple[float, str]:
        p, rows = self.problem, slice(0, GATED_ROWS)
        want = rk.reference.rhythm_credit(p.waad[rows].cpu(), p.fai[rows].cpu(), p.mask[rows].cpu())
        if "gamma" in got and not torch.equal(got["gamma"][rows].cpu(), want):
            return float("inf"), "gamma"
        return 0.0, "gamma"

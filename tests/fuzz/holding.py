"""Each public function of a backend on one case, held to the oracle inside of `tests.bounds`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels.reference import ColumnMoments
from tests import bounds
from tests.fuzz import oracle
from tests.fuzz.cases import DTYPES, Case, Made, lse_of, make
from tests.fuzz.oracle import Answer


def compare(name: str, got: Tensor, want: np.ndarray, bound: np.ndarray, dtype: torch.dtype = torch.float32) -> None:
    """Every number within its bound, infinities equal; a bound of 0 means the very number."""
    assert got.dtype == dtype, f"{name} is {got.dtype}, not {dtype}"
    assert tuple(got.shape) == want.shape, f"{name} has shape {tuple(got.shape)}, not {want.shape}"
    numbers = got.detach().cpu().double().numpy()
    with np.errstate(invalid="ignore"):
        fine = (numbers == want) | ((abs(numbers - want) <= bound) & np.isfinite(numbers))
    if not fine.all():
        at = tuple(int(i) for i in np.argwhere(~fine)[0])
        found = f"{numbers[at]:.9g}, not {want[at]:.9g} within {bound[at]:.2g}"
        raise AssertionError(f"{name} at {at}: {found}; {(~fine).sum()} such numbers")


class Held:
    """A case on a backend, its oracle's answers laid out as the caller's."""

    def __init__(self, case: Case, backend: str | None, device: str = "cpu") -> None:
        self.case, self.backend = case, backend
        self.made: Made = make(case, device)
        # Of all heads and live rows, whatever is selected and scored.
        self.lse = oracle.rows(self.everywhere(), list(range(case.n_heads)), 1, None)["lse"]
        # What is handed over is the float32 number, and is meant as such.
        self.given = torch.tensor(self.lse.value).float() if case.lse_given else None
        self.known = None if self.given is None else self.given.double().numpy()
        self.handed = [] if self.given is None else [lse_of(case, torch.tensor(self.lse.value), device)]
        self.scored = np.zeros((case.batch, 1, case.length), dtype=bool)
        self.lengths = np.zeros((case.batch, 1, case.length))
        for at in case.stretches:
            self.scored[at.batch_row, :, at.first : at.end] = True
            self.lengths[at.batch_row, :, at.live] = at.end - at.start

    def call(self, function: str, **options: Any) -> Any:
        """Of q, k and the log-sum-exp, where that is handed over."""
        tensors = (self.made.given["q"], self.made.given["k"], *self.handed)
        return getattr(rk, function)(*tensors, **self.made.options, **options, backend=self.backend)

    def measured(self, name: str, got: Tensor, want: Answer, bound: np.ndarray | float) -> None:
        """A result per head, or its mean over heads; 0, exactly, outside of the responses."""
        value, limit = want.value, np.where(self.scored, bound + want.slack, 0.0)
        if not self.case.per_head:
            value, limit = (x.mean(1, keepdims=True) for x in (value, limit))
            got = got.unsqueeze(-2)
        if self.case.packed:
            got = got[None]
        compare(name, got, value, limit)

    def rows(self) -> None:
        """waad and span."""
        case = self.case
        want = oracle.rows(self.made.numbers, case.selected, case.window, self.known)
        own = want if self.known is None else oracle.rows(self.made.numbers, case.selected, case.window, None)
        near = bounds.waad(min(case.window, case.length))
        waad = self.call("waad", window=case.integer(case.window), per_head=case.per_head)
        self.measured("waad", waad, want["waad"], near if case.lse_given else near * want["share"].value + 1e-30)
        assert float(waad.min()) >= 0 and float(waad.max()) <= case.window
        self.measured("span", self.call("span", per_head=case.per_head), own["span"], self.of_span())

    def of_span(self) -> np.ndarray:
        return bounds.span(1) * self.lengths

    def log_sum_exp(self) -> None:
        q, k = (self.made.given[name] for name in "qk")
        got = rk.attention_lse(q, k, **self.made.options, backend=self.backend)
        want = oracle.rows(self.made.numbers, self.case.selected, 1, None)["lse"]
        self.of_lse("attention_lse", got, want, self.scored)

    def of_lse(self, name: str, got: Tensor, want: Answer, live: np.ndarray) -> None:
        """-inf where there is no row to speak of."""
        value = np.where(live, want.value, -np.inf)
        limit = np.where(live, bounds.lse(torch.tensor(value)).numpy() + want.slack, 0.0)
        compare(name, got[None] if self.case.packed else got, value, limit)

    def columns(self) -> None:
        """fai, with both kinds of horizon, and column_moments."""
        case, numbers = self.case, self.made.numbers
        for horizon in (case.horizon, (case.horizon[0], None)):
            want = oracle.fai(numbers, case.selected, horizon, self.known)
            # The bound is a share of a weight of 1: here it is one of the mean itself, which is small.
            limit = bounds.fai() * want.value + 1e-12
            self.measured(f"fai {horizon}", self.call("fai", horizon=horizon, per_head=case.per_head), want, limit)

    def moments(self) -> None:
        case = self.case
        got = self.call("column_moments", min_distance=case.integer(case.nearest), per_head=case.per_head)
        want = oracle.moments(self.made.numbers, case.selected, case.nearest, self.known)
        target = ColumnMoments(**{name: torch.tensor(answer.value) for name, answer in want.items()})
        seen = bounds.seen(target).numpy()
        for name, bound in bounds.moments(target)._asdict().items():
            limit = bound.numpy()
            if name in ("skewness", "kurtosis"):
                limit = np.where(seen, limit, np.inf)
            self.measured(f"column_moments: {name}", getattr(got, name), want[name], limit)

    def attention(self) -> None:
        """out, lse, the statistics, and the gradients of q, k and v."""
        case, dtype = self.case, DTYPES[self.case.dtype]
        leaves = [self.made.given[name].detach().requires_grad_() for name in "qkv"]
        upstream = self.made.given["upstream"]
        out, lse, stats = rk.attention_with_rhythm(
            *leaves, **self.made.options, window=case.integer(case.window), per_head=case.per_head, backend=self.backend
        )
        assert not (lse.requires_grad or stats.waad.requires_grad or stats.span.requires_grad)
        gradients = torch.autograd.grad(out, leaves, upstream)
        want = oracle.attention(self.made.numbers)
        relative, least = bounds.rounding(dtype)

        def held(name: str, got: Tensor, answer: Answer, size: np.ndarray, share: float, floor: np.ndarray) -> None:
            limit = share * size + relative * abs(answer.value) + answer.slack + least * (floor + (size > 0))
            limit = np.where(abs(answer.value) > torch.finfo(dtype).max / 2, np.inf, limit)
            compare(name, got[None] if case.packed else got, answer.value, limit, dtype)

        # 16-bit weights, and products with them, are rounded once more each.
        largest = float(abs(self.made.numbers.v).max())
        floor = np.where(want.out_size > 0, largest * self.lengths.max(), 0.0)
        size = np.where(want.out_size > 0, largest * bounds.OUT / (bounds.OUT + 2 * relative), 0.0)
        size = size + want.out_size * 2 * relative / (bounds.OUT + 2 * relative)
        held("out", out, want.out, size, bounds.OUT + 2 * relative, floor)
        share = bounds.GRADIENT + 4 * relative
        for name, got in zip("qkv", gradients, strict=True):
            scale = want.floors[name] * (1 + largest)
            held(f"d{name}", got, want.gradients[name], want.sizes[name], share, scale)
        rows = oracle.rows(self.made.numbers, case.selected, case.window, None)
        live = self.lengths > 0
        self.of_lse("lse of attention", lse, self.lse, live)
        near = bounds.waad(min(case.window, case.length)) * rows["share"].value + 1e-30
        self.measured("waad of attention", stats.waad, rows["waad"], near)
        self.measured("span of attention", stats.span, rows["span"], self.of_span())

    def everywhere(self) -> oracle.Inputs:
        """The same with whole sequences as responses."""
        p = self.made.numbers
        stretches = [at._replace(first=at.start) for at in p.stretches]
        return replace(p, stretches=stretches)


FUNCTIONS = ("rows", "log_sum_exp", "columns", "moments", "attention")


def hold(case: Case, backend: str | None, device: str = "cpu", functions: tuple[str, ...] = FUNCTIONS) -> None:
    held = Held(case, backend, device)
    for name in functions:
        if name == "attention" and backend == "cpu":
            held.backend = None  # the default on a CPU is its attention
        getattr(held, name)()

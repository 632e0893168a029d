"""Calls that need little of what their tensors hold, beside calls that need it all: each must cost its share.

A column pass behind a sliding window beside the row pass behind it; a few heads beside all; many short sequences,
packed in one batch row, beside one long one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference

from ..gate import WHOLE, Results, tolerance, worst
from ..shapes import PartShape

Call = Callable[[], Results]
MIN_DISTANCE = 4


@dataclass(frozen=True)
class PartProblem:
    """q `(B, T, H, D)`, k, and the log-sum-exp `(B, H, T)` of one sequence a batch row; `lse_short`: of short ones."""

    shape: PartShape
    q: Tensor
    k: Tensor
    lse: Tensor
    lse_short: Tensor | None

    @classmethod
    def draw(cls, shape: PartShape, device: torch.device, seed: int = 0) -> PartProblem:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int) -> Tensor:
            size = (shape.batch, shape.length, heads, shape.dim)
            return (torch.randn(size, generator=generator, device=device) * 2**0.5).to(shape.torch_dtype)

        q, k = normal(shape.heads), normal(shape.kv_heads)
        lse = rk.attention_lse(q, k, window_size=(shape.left, 0))
        short = rk.attention_lse(q[0], k[0], cu_seqlens=cu_seqlens(shape, device)) if shape.short else None
        return cls(shape, q, k, lse, short)


def cu_seqlens(shape: PartShape, device: torch.device) -> Tensor:
    """Sequences of `short` tokens, one after the other."""
    return torch.arange(0, shape.length + 1, shape.short, dtype=torch.int32, device=device)


def moments(backend: str) -> Callable[[PartProblem], Call]:
    def make(p: PartProblem) -> Call:
        window = (p.shape.left, 0)
        return lambda: rk.column_moments(
            p.q, p.k, p.lse, min_distance=MIN_DISTANCE, window_size=window, backend=backend
        )._asdict()

    return make


def fai_to_the_end(backend: str) -> Callable[[PartProblem], Call]:
    def make(p: PartProblem) -> Call:
        horizon, window_size = (p.shape.lo, None), (p.shape.left, 0)
        return lambda: {"fai_full": rk.fai(p.q, p.k, p.lse, horizon=horizon, window_size=window_size, backend=backend)}

    return make


def span(backend: str) -> Callable[[PartProblem], Call]:
    return lambda p: lambda: {"span": rk.span(p.q, p.k, window_size=(p.shape.left, 0), backend=backend)}


def waad(backend: str, part: bool) -> Callable[[PartProblem], Call]:
    """WAAD of all heads of one sequence a batch row; `part`: of the selected heads, or of the short sequences."""
    return lambda p: _band(p, part, "waad", rk.waad, window=p.shape.window, backend=backend)


def fai(backend: str, part: bool) -> Callable[[PartProblem], Call]:
    return lambda p: _band(p, part, "fai", rk.fai, horizon=(p.shape.lo, p.shape.hi), backend=backend)


def _band(p: PartProblem, part: bool, name: str, function: Callable[..., Tensor], **options: Any) -> Call:
    if not part:
        return lambda: {name: function(p.q, p.k, p.lse, **options)}
    if p.shape.short:
        ends = cu_seqlens(p.shape, p.q.device)
        return lambda: {f"{name} of the part": function(p.q[0], p.k[0], p.lse_short, cu_seqlens=ends, **options)[None]}
    heads = list(p.shape.selected)
    return lambda: {f"{name} of the part": function(p.q, p.k, p.lse, heads=heads, **options)}


class PartGate:
    """The float64 definitions at one end of the sequence, where they need no more than that end.

    With a sliding window these are the last tokens, whose columns end there; else the first, whose rows begin there.
    """

    def __init__(self, problem: PartProblem) -> None:
        self.problem = problem
        shape = problem.shape
        n = min(WHOLE, shape.length)
        if shape.left >= 0:
            q, k = (x[:, -(n + shape.left) :].double() for x in (problem.q, problem.k))
            window = {"window_size": (shape.left, 0)}
            last = slice(shape.length - n, None)
            found = reference.column_moments(q, k, min_distance=MIN_DISTANCE, **window)._asdict()
            found["fai_full"] = reference.fai(q, k, horizon=(shape.lo, None), **window)
            found["span"] = reference.span(q, k, **window)
            self.want = {name: (last, x[:, -n:]) for name, x in found.items()}
            return
        if shape.short:
            n -= n % shape.short
        q, k = (x[:, :n].double() for x in (problem.q, problem.k))
        horizon = (shape.lo, shape.hi)
        rows, columns = slice(0, n), slice(0, n - shape.hi)  # of later columns some rows are beyond these tokens
        self.want = {
            "waad": (rows, reference.waad(q, k, window=shape.window)),
            "fai": (columns, reference.fai(q, k, horizon=horizon)[:, columns]),
        }
        if shape.short:
            packed: dict[str, Any] = {"cu_seqlens": torch.arange(0, n + 1, shape.short, dtype=torch.int32)}
            self.want["waad of the part"] = rows, reference.waad(q[0], k[0], window=shape.window, **packed)[None]
            self.want["fai of the part"] = rows, reference.fai(q[0], k[0], horizon=horizon, **packed)[None]
        else:
            heads = list(shape.selected)
            self.want["waad of the part"] = rows, reference.waad(q, k, window=shape.window, heads=heads)
            fai_ = reference.fai(q, k, horizon=horizon, heads=heads)
            self.want["fai of the part"] = columns, fai_[:, columns]

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance, and whose it is."""
        largest, which = 0.0, ""
        for name, result in got.items():
            if result.shape != self.problem.q.shape[:2]:
                return float("inf"), f"{name} has shape {tuple(result.shape)}"
            where, want = self.want[name]
            error = worst(result[:, where], want, tolerance(name.removesuffix(" of the part"), want, self.problem))
            if error >= largest:
                largest, which = error, name
        return largest, which

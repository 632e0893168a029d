"""Our passes through the documented functions, one contender a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

import rhythm_kernels as rk
from rhythm_kernels import ops
from rhythm_kernels.rule import Rule

from ..gate import Results
from ..problem import AttentionProblem

Call = Callable[[], Results]
MOMENTS = ("mean", "variance", "skewness", "kurtosis")


def unavailable(pass_name: str, backend: str) -> Callable[[torch.device], str]:
    """A function of the device: "" where the backend runs the pass there, else the reason it does not."""

    def reason(device: torch.device) -> str:
        try:
            ops.choose(pass_name, backend, device)
        except ValueError as error:
            return str(error)
        return ""

    return reason


def band_rows(backend: str | None) -> Callable[[AttentionProblem], Call]:
    return lambda p: lambda: {"waad": rk.waad(p.q, p.k, p.lse, window=p.shape.window, backend=backend)}


def band_columns(backend: str | None) -> Callable[[AttentionProblem], Call]:
    return lambda p: lambda: {"fai": rk.fai(p.q, p.k, p.lse, horizon=(p.shape.lo, p.shape.hi), backend=backend)}


def row_stats(backend: str) -> Callable[[AttentionProblem], Call]:
    """One pass gives all three; the documented functions return one each, so the op is called itself."""

    def make(p: AttentionProblem) -> Call:
        shape = p.shape
        device = p.device
        seqs = torch.tensor([(row, 0, shape.length, 0) for row in range(shape.batch)], dtype=torch.int32, device=device)
        index = torch.arange(shape.heads, dtype=torch.int32, device=device)
        heads = torch.stack([index, index], dim=1)
        rule = Rule(seqs, heads, shape.length, p.scale, 0.0, -1, None)

        def call() -> Results:
            lse, waad, span = ops.row_stats(p.q, p.k, *rule, shape.window, False, backend)
            return {"lse": lse, "waad": waad, "span": span}

        return call

    return make


def column_stats(backend: str) -> Callable[[AttentionProblem], Call]:
    return lambda p: lambda: {"fai_full": rk.fai(p.q, p.k, p.lse, horizon=(0, None), backend=backend)}


def column_moments(backend: str) -> Callable[[AttentionProblem], Call]:
    def make(p: AttentionProblem) -> Call:
        def call() -> Results:
            moments = rk.column_moments(p.q, p.k, p.lse, min_distance=0, backend=backend)
            return {name: getattr(moments, name) for name in MOMENTS}

        return call

    return make


def attention(backend: str | None) -> Callable[[AttentionProblem], Call]:
    def make(p: AttentionProblem) -> Call:
        def call() -> Results:
            out, lse, stats = rk.attention_with_rhythm(p.q, p.k, p.v, window=p.shape.window, backend=backend)
            return {"out": out, "lse": lse, "waad": stats.waad, "span": stats.span}

        return call

    return make

"""The correctness gate: what a rival returns at the timed shape, held to the dense float64 definition.

Up to `WHOLE` tokens everything is compared. Beyond, two parts of the result are, both exact in float64: the first
`WHOLE` tokens, which by causality are those of the shorter problem (:mod:`rhythm_kernels.reference`), and the last
`TAIL` rows and columns, from the complete rows of attention that they need.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rhythm_kernels import reference
from rhythm_kernels.reference import formulas
from tests import bounds

from .problem import AttentionProblem
from .shapes import AttentionShape

WHOLE = 384
TAIL = 128
_TAIL_BYTES = 2**29

Results = dict[str, Tensor]

# Results of a column s depend on all later rows (FAI: on the next `hi` rows), all others on earlier tokens alone.
_COLUMN = ("fai", "fai_full", "mean", "variance", "skewness", "kurtosis")
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def measures(maps: Tensor, first: int, shape: AttentionShape) -> Results:
    """Every measure of rows and columns `[first, T)` from their rows of attention `maps (B, H, T - first, T)`.

    Means over the heads, in float64 as `maps` is. Each column at or after `first` has all its later rows in `maps`.
    """
    rows, length = maps.shape[-2:]
    distance = formulas.distances(length, maps.device, first)
    square, near = maps[..., first:], distance[:, first:]
    every = torch.ones(rows, dtype=torch.bool, device=maps.device)
    later = formulas.future(near, every, 0)
    mean_map = maps.mean(dim=1)
    moments = formulas.moments(square, later)
    return {
        "waad": formulas.waad(mean_map, distance, shape.window),
        "span": formulas.span(mean_map, distance),
        "fai": formulas.fai(mean_map[..., first:], formulas.future(near, every, shape.lo, shape.hi)),
        "fai_full": formulas.fai(mean_map[..., first:], later),
        **{name: getattr(moments, name).mean(dim=1) for name in ("mean", "variance", "skewness", "kurtosis")},
    }


def tail_definition(problem: AttentionProblem, first: int, with_out: bool) -> Results:
    """Results of rows and columns `[first, T)` in float64, from complete rows of attention.

    One kv head at a time: at a million tokens there is memory for one such part twice, not for all.
    """
    shape, q = problem.shape, problem.q[:, first:]
    size = (shape.batch, shape.heads, shape.length - first)
    maps = torch.empty((*size, shape.length), dtype=torch.float64, device=problem.device)
    lse, out = maps.new_empty(size), maps.new_empty(q.shape)
    for at in range(shape.batch):
        for kv_head in range(shape.kv_heads):
            heads = slice(kv_head * problem.kv_group, (kv_head + 1) * problem.kv_group)
            k, v = (x[at, :, kv_head, None].double() for x in (problem.k, problem.v))
            x = formulas.logits(q[at, :, heads].double(), k)
            lse[at, heads] = formulas.row_lse(x)
            maps[at, heads] = torch.exp(x - lse[at, heads, :, None])
            if with_out:
                out[at, :, heads] = formulas.attention(maps[at, heads], v)
    return {"lse": lse, **measures(maps, first, shape), **({"out": out} if with_out else {})}


def head_definition(problem: AttentionProblem, length: int) -> Results:
    """Results of the first `length` tokens in float64, by the dense definitions of the package."""
    q, k, v = (x[:, :length].double() for x in (problem.q, problem.k, problem.v))
    shape = problem.shape
    moments = reference.column_moments(q, k, min_distance=0)
    out, lse, stats = reference.attention_with_rhythm(q, k, v, window=shape.window)
    return {
        "out": out,
        "lse": lse,
        "waad": stats.waad,
        "span": stats.span,
        "fai": reference.fai(q, k, horizon=(shape.lo, shape.hi)),
        "fai_full": moments.mean,
        **{name: getattr(moments, name) for name in ("mean", "variance", "skewness", "kurtosis")},
    }


def tolerance(name: str, want: Tensor, problem: AttentionProblem) -> Tensor | float:
    """How far a result may be from the float64 definition of the same rounded inputs."""
    shape = problem.shape
    if name == "waad":
        return bounds.waad(shape.window)
    if name == "span":
        return bounds.span(shape.length)
    if name == "lse":
        return bounds.lse(want)
    if name == "out":
        return _ROUNDING[problem.q.dtype] * float(want.abs().max())
    if name in ("fai", "fai_full"):  # at long T far below the bound: held to a share of the largest value too
        return min(bounds.fai(), bounds.MOMENT * float(want.max()))
    if name in ("skewness", "kurtosis"):
        return bounds.MOMENT * want.abs().clamp(min=1)
    return bounds.MOMENT * want.abs() + 1e-9 * float(want.abs().max())


def worst(found: Tensor, wanted: Tensor, limit: Tensor | float) -> float:
    """The largest error in units of its limit; infinite where something is NaN or has another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(((found.double() - wanted).abs() / limit).nan_to_num(nan=float("inf")).max())


def tail_rows(shape: AttentionShape) -> int:
    """How many of the last rows are held to complete rows of attention: enough for a horizon, as memory allows."""
    row_bytes = 8 * shape.batch * shape.heads * shape.length
    return min(TAIL, max(shape.hi + 14, _TAIL_BYTES // row_bytes))


def _worst(got: Results, want: Results, problem: AttentionProblem, part: slice, where: str) -> tuple[float, str]:
    largest, which = 0.0, ""
    for name, result in got.items():
        # Every result ends in its tokens but the output, (B, T, H, D).
        tokens = 1 if name == "out" else result.dim() - 1
        found = result.double()[(slice(None),) * tokens + (part,)]
        wanted = want[name]
        if where == "head" and name in _COLUMN:
            if name != "fai":
                continue
            keep = WHOLE - problem.shape.hi
            found, wanted = found[..., :keep], wanted[..., :keep]
        if found.shape != wanted.shape:
            return float("inf"), f"{name} has shape {tuple(result.shape)}"
        error = worst(found, wanted, tolerance(name, wanted, problem))
        if error >= largest:
            largest, which = error, f"{name} of the {where}"
    return largest, which


class AttentionGate:
    """The definitions of one problem, computed once, and the error of each rival's results against them."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem = problem
        self.length = problem.shape.length
        self._tails: dict[bool, Results] = {}

    @functools.cached_property
    def _head(self) -> Results:
        return head_definition(self.problem, min(WHOLE, self.length))

    def error(self, got: Results) -> tuple[float, str]:
        """The largest error in units of its tolerance (above 1: the gate is red), and where it was found."""
        if self.length <= WHOLE:
            return _worst(got, self._head, self.problem, slice(0, self.length), "whole")
        first = self.length - tail_rows(self.problem.shape)
        with_out = "out" in got
        if with_out not in self._tails:
            self._tails[with_out] = tail_definition(self.problem, first, with_out)
        head = _worst(got, self._head, self.problem, slice(0, WHOLE), "head")
        return max(head, _worst(got, self._tails[with_out], self.problem, slice(first, None), "tail"))

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

from .problem import AttentionProblem
from .shapes import AttentionShape

WHOLE = 384
TAIL = 128
_TAIL_BYTES = 2**29

Results = dict[str, Tensor]

# Results of a row t depend on the keys before it alone; those of a column s on all later rows, or on the next `hi`.
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
    """Results of rows and columns `[first, T)` in float64: complete rows of attention, whatever T is."""
    query, key, value = problem.heads_first
    q = query[:, :, first:].double().unflatten(1, (problem.shape.kv_heads, problem.group))
    x = torch.einsum("bkgtd,bksd->bkgts", q, key.double()).flatten(1, 2) * problem.scale
    position = torch.arange(x.shape[-1], device=x.device)
    x.masked_fill_(position[first:, None] < position, float("-inf"))
    lse = torch.logsumexp(x, dim=-1)
    maps = x.sub_(lse[..., None]).exp_()
    results = {"lse": lse, **measures(maps, first, problem.shape)}
    if with_out:
        grouped = maps.unflatten(1, (problem.shape.kv_heads, problem.group))
        results["out"] = torch.einsum("bkgts,bksd->btkgd", grouped, value.double()).flatten(2, 3)
    return results


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
    """How far a result may lie from the float64 definition of the same rounded inputs."""
    shape = problem.shape
    if name == "waad":
        return 1e-4 * max(1.0, shape.window / 10)
    if name == "span":
        return 1e-4 * shape.length
    if name == "lse":
        return 1e-4 * want.abs().clamp(min=1)
    if name == "out":
        return _ROUNDING[problem.q.dtype] * float(want.abs().max())
    if name in ("fai", "fai_full"):  # far below 1e-4 at long T: held to the largest value too
        return min(1e-4, 1e-3 * float(want.max()))
    if name in ("skewness", "kurtosis"):
        return 1e-3 * want.abs().clamp(min=1)
    return 1e-3 * want.abs() + 1e-9 * float(want.abs().max())


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

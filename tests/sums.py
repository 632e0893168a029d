"""Rows whose sums are hard on float32: a sink or a first key that takes nearly all, and keys that are all alike.

Every pass of a backend is held on them to float64 computed in row blocks, inside the documented bounds.
``python -m tests.sums 32768 cpu torch`` prints each error as a share of its bound.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rhythm_kernels import ops
from rhythm_kernels.reference import ColumnMoments
from rhythm_kernels.rule import Rule

from . import bounds, row_blocks
from .row_blocks import Measures

DIM, VALUE_DIM, SCALE, MIN_DISTANCE = 4, 3, 1.0, 10


class Head(NamedTuple):
    """`first`: how far the first key's logit is above the others'; `spread`: the others' standard deviation; a sink."""

    first: float = 0.0
    spread: float = 0.0
    sink: float = 0.0


SINKS = (Head(sink=4), Head(sink=8), Head(sink=12), Head(sink=16, spread=1), Head(sink=20))
FIRST = (Head(), Head(first=12), Head(first=12, spread=1), Head(first=16), Head(first=18.5))


def tokens(head: Head, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k `(T, D)` and v `(T, D_v)` of one head; without `spread` and `first` all logits are 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, dim, generator=generator) for dim in (DIM, DIM, VALUE_DIM))
    q[:, 1:] *= head.spread * 3**-0.5  # the products of the last three numbers spread by sqrt(3)
    q[:, 0], k[:, 0] = 1.0, 0.0
    if head.first:
        k[0] = torch.tensor([head.first, 0.0, 0.0, 0.0])
    return q, k, v


def checked_keys(length: int) -> Tensor:
    """Keys whose moments are compared: all of a short sequence, the first and every n-th of a long one."""
    position = torch.arange(length)
    return position[(position < 64) | (position % (1 + length // 1024) == 0)]


@functools.cache
def truth(head: Head, length: int, window: int, horizon: tuple[int, int]) -> Measures:
    q, k, v = (x[:, None] for x in tokens(head, length))
    sinks = torch.tensor([float(head.sink)]) if head.sink else None
    return row_blocks.measures(q, k, v, SCALE, sinks, window, horizon, MIN_DISTANCE, checked_keys(length))


class Given(NamedTuple):
    """The canonical form of one sequence with these heads, each with keys of its own."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule


def given(heads: Sequence[Head], length: int) -> Given:
    q, k, v = (torch.stack(x, 1)[None] for x in zip(*(tokens(head, length) for head in heads)))
    seqs = torch.tensor([[0, 0, length, 0]], dtype=torch.int32)
    table = torch.tensor([[i, i] for i in range(len(heads))], dtype=torch.int32)
    sinks = torch.tensor([float(head.sink) for head in heads]) if heads[0].sink else None
    return Given(q, k, v, Rule(seqs, table, length, SCALE, 0.0, -1, sinks))


def errors(
    heads: Sequence[Head], length: int, backend: str, passes: Sequence[str], window: int = 10,
    horizon: tuple[int, int] = (10, 100),
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Per quantity: each head's largest error, as a share of its bound."""
    x = given(heads, length)
    each = [truth(head, length, window, horizon) for head in heads]
    joined = {name: [getattr(one, name) for one in each] for name in Measures._fields}
    want = Measures(**{name: torch.cat(x, int(name in ("out", "moments"))) for name, x in joined.items()})
    lse = want.lse.float()[None]

    def run(name: str, *args: object) -> tuple[Tensor, ...]:
        result = getattr(torch.ops.rhythm_kernels, name)(*args, backend)
        return result if isinstance(result, tuple) else (result,)

    def share(got: Tensor, target: Tensor, bound: Tensor | float) -> Tensor:
        assert got.shape == target.shape
        return ((got.double() - target).abs() / bound).amax(-1)

    def relative(fai: Tensor) -> Tensor:
        """Stricter than the bound, which is absolute: where attention is spread, FAI itself is below that."""
        return bounds.fai() * fai.clamp(min=1e-12)

    by_sink = (
        1.0 if x.rule.sinks is None else -torch.expm1(x.rule.sinks.double()[:, None] - want.lse)
    )  # what the keys have
    near = bounds.waad(window)
    if "band_rows" in passes:
        (waad,) = run("band_rows", x.q, x.k, lse, *x.rule, window, True)
        yield "band_rows: waad", share(waad[0], want.waad, near)
    if "band_columns" in passes:
        (fai,) = run("band_columns", x.q, x.k, lse, *x.rule, *horizon, True)
        yield "band_columns: fai", share(fai[0], want.band_fai, relative(want.band_fai))
        band_mean = want.band_fai.mean(0)[None]
        (mean,) = run("band_columns", x.q, x.k, lse, *x.rule, *horizon, False)
        yield "band_columns: fai, the mean over heads", share(mean, band_mean, relative(band_mean))
    if "row_stats" in passes:
        got_lse, waad, span = run("row_stats", x.q, x.k, *x.rule, window, True)
        yield "row_stats: lse", share(got_lse[0], want.lse, bounds.lse(want.lse))
        yield "row_stats: waad", share(waad[0], want.waad, near * by_sink)
        yield "row_stats: span", share(span[0], want.span, bounds.span(length))
    if "column_stats" in passes:
        (fai,) = run("column_stats", x.q, x.k, lse, *x.rule, MIN_DISTANCE, False, True)
        yield "column_stats: fai to the end", share(fai[0, 0], want.fai, relative(want.fai))
        (planes,) = run("column_stats", x.q, x.k, lse, *x.rule, MIN_DISTANCE, True, True)
        got, target = (ColumnMoments(*m) for m in (planes[:, 0, :, checked_keys(length)], want.moments))
        seen = bounds.seen(target)
        for name, bound in bounds.moments(target)._asdict().items():
            a, b = getattr(got, name), getattr(target, name)
            if name in ("skewness", "kurtosis"):
                a, b = torch.where(seen, a, 0.0), torch.where(seen, b, 0.0)
            yield f"column_stats: {name}", share(a, b, bound)
    if "attention" in passes:
        out, got_lse, waad, span = run("attention", x.q, x.k, x.v, *x.rule, window, True)
        largest = float(x.v.abs().max())
        yield "attention: out", share(out[0], want.out, bounds.OUT * largest).amax(0)
        yield "attention: lse", share(got_lse[0], want.lse, bounds.lse(want.lse))
        yield "attention: waad", share(waad[0], want.waad, near * by_sink)
        yield "attention: span", share(span[0], want.span, bounds.span(length))


def gradient_errors(heads: Sequence[Head], length: int, backend: str) -> Iterator[tuple[str, Tensor]]:
    """The same of the gradients of `attention`'s output, by its own lse."""
    x = given(heads, length)
    out, lse, _, _ = ops.attention(x.q, x.k, x.v, *x.rule, 10, True, backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    backward = torch.ops.rhythm_kernels.attention_backward
    got = backward(upstream, x.q, x.k, x.v, out, lse, *x.rule, backend)
    want = row_blocks.gradients(x.q[0], x.k[0], x.v[0], SCALE, x.rule.sinks, upstream[0])
    for (name, (gradient, size)), a in zip(want.items(), got):
        bound = bounds.GRADIENT * size.clamp(min=1e-30)
        yield f"attention_backward: d{name}", ((a[0].double() - gradient).abs() / bound).amax((0, 2))


def hold(shares: Iterator[tuple[str, Tensor]]) -> None:
    """All below 1; printed, so that `pytest -rP` shows what `bounds.MEASURED` is made of."""
    largest = {name: float(share.max()) for name, share in shares}
    print(*(f"{name:42} {share:.1e}" for name, share in largest.items()), sep="\n")
    failed = {name: share for name, share in largest.items() if not share < 1}
    assert not failed, f"errors as shares of their bounds: {failed}"


ALL = ("band_rows", "band_columns", "row_stats", "column_stats", "attention")
PASSES = {"cpu": ALL, "torch": ALL, "triton": ALL, "cuda": ALL[:2]}


def main(length: str, *backends: str) -> None:
    for backend in backends:
        for heads in (SINKS, FIRST):
            for name, share in errors(heads, int(length), backend, PASSES[backend]):
                print(f"{backend:6} {name:42}", *(f"{x:.1e}" for x in share.flatten().tolist()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The measures in float64, one block of rows at a time: the truth where a map of tokens x tokens would not fit.

Nothing here is shared with a backend or with `rhythm_kernels.reference`. Columns are gone through twice: first for the
mean of each key, then for the powers of what is left after it. Logits stay below a few hundred, and float64 then needs
no maximum taken out of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # rows: a block of 32,768 keys still fits a cache


class Measures(NamedTuple):
    """float64; one sequence of T tokens, H heads."""

    lse: Tensor  # (H, T)
    waad: Tensor  # (H, T)
    span: Tensor  # (H, T)
    out: Tensor  # (T, H, D_v)
    band_fai: Tensor  # (H, T), of `horizon`
    fai: Tensor  # (H, T), of all rows from `min_distance` on
    moments: Tensor  # (5, H, len(keys)): count, mean, variance, skewness, kurtosis of the same rows


def weights(q: Tensor, k: Tensor, scale: float, min_distance: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """One head's `exp(x)` a block of rows at a time: `(rows, keys up to the last row)`, 0 below `min_distance`."""
    for first in range(0, q.shape[0], BLOCK):
        last = min(first + BLOCK, q.shape[0])
        e = (q[first:last] @ k[:last].T).mul_(scale).exp_()
        yield slice(first, last), hide(e, first, min_distance)


def hide(pairs: Tensor, first: int, min_distance: int) -> Tensor:
    """In place: 0 where row `first + i` is nearer than `min_distance` to key j, or before it."""
    start = max(0, first - min_distance + 1)
    rows, keys = torch.arange(first, first + pairs.shape[0]), torch.arange(start, pairs.shape[1])
    pairs[:, start:].masked_fill_(rows[:, None] - keys < min_distance, 0.0)
    return pairs


def measures(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, window: int, horizon: tuple[int, int],
    min_distance: int, keys: Tensor,
) -> Measures:  # fmt: skip
    """Of `q, k (T, H, D)`, `v (T, H, D_v)`, every head with keys of its own, `sinks (H,)`; moments of `keys` alone."""
    length, heads, _ = q.shape
    position = torch.arange(length, dtype=torch.float64)
    lse, waad, span, band_fai, fai = (torch.zeros(heads, length, dtype=torch.float64) for _ in range(5))
    out = torch.zeros(length, heads, v.shape[2], dtype=torch.float64)
    moments = torch.zeros(5, heads, len(keys), dtype=torch.float64)
    lo, hi = horizon
    count = (length - position - min_distance).clamp(min=0)
    for head in range(heads):
        queries, columns, values = (x[:, head].double() for x in (q, k, v))
        summed = torch.cat([torch.ones(length, 1, dtype=torch.float64), position[:, None], values], 1)
        for rows, e in weights(queries, columns, scale):
            sums = e @ summed[: rows.stop]
            whole = sums[:, 0] + (0.0 if sinks is None else sinks[head].double().exp())
            lse[head, rows] = whole.log()
            sums /= whole[:, None]
            out[rows, head] = sums[:, 2:]
            span[head, rows] = position[rows] * sums[:, 0] - sums[:, 1]
            near = slice(max(0, rows.start - window), rows.stop)
            distance = position[rows, None] - position[None, near]
            band = (e[:, near] * (window - distance).clamp(min=0)).sum(1) / whole
            waad[head, rows] = window * sums[:, 0] - band
            reach = slice(max(0, rows.start - hi), max(0, rows.stop - lo))
            distance = position[rows, None] - position[None, reach]
            share = e[:, reach] / whole[:, None]
            band_fai[head, reach] += (share * ((distance >= lo) & (distance <= hi))).sum(0)
            fai[head, : rows.stop] += whole.reciprocal() @ hide(e, rows.start, min_distance)
        fai[head] /= count.clamp(min=1)
        band_fai[head] /= (torch.clamp(position + hi, max=length - 1) - (position + lo) + 1).clamp(min=1)
        moments[:, head] = central_moments(queries, columns, scale, lse[head], fai[head], count, min_distance, keys)
    return Measures(lse, waad, span, out, band_fai, fai, moments)


def central_moments(
    q: Tensor, k: Tensor, scale: float, lse: Tensor, mean: Tensor, count: Tensor, min_distance: int, keys: Tensor
) -> Tensor:
    """One head's `(5, len(keys))`; `lse`, `mean` and `count` are those of all tokens."""
    powers = torch.zeros(3, len(keys), dtype=torch.float64)
    mean, count, columns = mean[keys], count[keys], k[keys]
    for first in range(0, q.shape[0], BLOCK):
        rows = torch.arange(first, min(first + BLOCK, q.shape[0]))
        left = torch.exp(q[rows] @ columns.T * scale - lse[rows, None]) - mean
        left[rows[:, None] - keys < min_distance] = 0.0
        square = left * left
        powers += torch.stack([square.sum(0), (square * left).sum(0), (square * square).sum(0)])
    powers /= count.clamp(min=1)
    spread = (powers[0] != 0) & (count >= 2)
    deviation = torch.where(spread, powers[0], 1.0).sqrt()
    standardised = [torch.where(spread, powers[i] / deviation ** (i + 2), 0.0) for i in (1, 2)]
    return torch.stack([count, mean, torch.where(count >= 2, powers[0], 0.0), *standardised])


def gradients(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, upstream: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of `(out * upstream).sum()` with respect to q, k and v: name -> the gradient, and what its terms come to.

    The second is the same sum of the terms' sizes: where one key has nearly all of a row, `dout . v - dout . out`
    cancels, and float32 knows the gradient to 2^-24 of the terms, not of what is left of them.
    """
    q, k, v, upstream = (x.double() for x in (q, k, v, upstream))
    found = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    for head in range(q.shape[1]):
        for rows, e in weights(q[:, head], k[:, head], scale):
            keys = slice(0, rows.stop)
            whole = e.sum(1) + (0.0 if sinks is None else sinks[head].double().exp())
            a = e / whole[:, None]
            product = upstream[rows, head] @ v[keys, head].T
            mixed = (a * product).sum(1, keepdim=True)
            terms = upstream[rows, head].abs() @ v[keys, head].abs().T
            slope = a * (product - mixed) * scale
            size = a * (terms + (a * terms).sum(1, keepdim=True)) * abs(scale)
            for i, dx in enumerate((slope, size)):
                of = torch.abs if i else torch.clone
                found["q"][i][rows, head] += dx @ of(k[keys, head])
                found["k"][i][keys, head] += dx.T @ of(q[rows, head])
                found["v"][i][keys, head] += a.T @ of(upstream[rows, head])
    return found

"""The formulas of arXiv 2510.13554v2 for one sequence: logits `x`, attention `A = softmax(x)`, and the measures of A.

Every measure is a function of `A (..., n, n)`, where `A[t, s]` is what query t pays to key s, and of the distances
`t - s`. Given some complete rows alone, `A (..., rows, n)`, WAAD and span are those of these rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ColumnMoments(NamedTuple):
    """Count, mean, population variance, skewness and kurtosis (``m4 / m2**2``) of the attention a token receives."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls on moments
    mean: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in the precision of all computation here: float64 if it is float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def distances(n: int, device: torch.device | str = "cpu", first: int = 0) -> Tensor:
    """`(n - first, n)` int64: t - s of the rows t from `first` on, negative where s is after t."""
    position = torch.arange(n, device=device)
    return position[first:, None] - position[None, :]


def visible(distance: Tensor, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """`(n, n)` bool: whether query t sees key s."""
    seen = distance >= 0
    if window_size[0] >= 0:
        seen &= distance <= min(window_size[0], distance.shape[-1])
    return seen


def logits(
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The score rule: `q (n, H, D), k (n, H_kv, D) -> x (H, n, n)`, `-inf` where s is not visible to t.

    q may be the last rows of the sequence alone, `(rows, H, D)`; x is then `(H, rows, n)`. `alibi_slopes (H,)`: each
    head's slope (ALiBi, arXiv 2108.12409), without a gradient.
    """
    rows, heads, dim = q.shape
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    keys = widen(k).repeat_interleave(heads // k.shape[1], dim=1)
    distance = distances(len(k), q.device, len(k) - rows)
    with torch.autocast(q.device.type, enabled=False):
        x = torch.einsum("thd,shd->hts", widen(q), keys) * scale
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    if alibi_slopes is not None:
        x = x - alibi_slopes.detach().to(x.dtype)[:, None, None] * distance
    return x.masked_fill(~visible(distance, window_size), float("-inf"))


def row_lse(x: Tensor, sinks: Tensor | None = None) -> Tensor:
    """`(H, n, n) -> (H, n)`: the log-sum-exp of each row and the head's sink; NaN where it would be `+inf`."""
    lse = torch.logsumexp(x, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
    return torch.where(lse == math.inf, math.nan, lse)


def attention_maps(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`A (H, n, n)` of one sequence `q (n, H, D)`, `k (n, H_kv, D)`: `exp(x - lse)`, 0 at keys that are not seen.

    `lse (H, n)` is computed where it is None. With a sink, or a given `lse`, a row need not sum to 1. A row is NaN, at
    the keys it sees, where its `lse` is not finite or the sink of its head is `+inf` or NaN; a sink of `-inf` is none.
    """
    x = logits(q, k, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes)
    lse = row_lse(x, sinks) if lse is None else lse.to(x.dtype)
    known = lse.isfinite()
    if sinks is not None:
        known = known & (sinks < math.inf)[:, None]
    maps = torch.exp(x - torch.where(known, lse, math.nan)[..., None])
    return torch.where(visible(distances(len(q), q.device), window_size), maps, 0.0)


def attention(maps: Tensor, v: Tensor) -> Tensor:
    """`A (H, n, n), v (n, H_kv, D_v) -> (n, H, D_v)`: `out[t] = sum_s A[t, s] v[s]`."""
    values = widen(v).repeat_interleave(len(maps) // v.shape[1], dim=1)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum("hts,shd->thd", maps, values)


def waad(maps: Tensor, distance: Tensor, window: int) -> Tensor:
    """Eq. 9: `WAAD[t] = sum_s A[t, s] min(t - s, W)`."""
    limit = min(window, maps.shape[-1])
    # A given lse is rounded: a row may sum to a little more than 1, and its WAAD come out above W.
    return (maps * distance.clamp(min=0, max=limit)).sum(dim=-1).clamp(0, limit)


def span(maps: Tensor, distance: Tensor) -> Tensor:
    """The summand of eq. 7: `sum_s A[t, s] (t - s)`."""
    return (maps * distance.clamp(min=0)).sum(dim=-1)


def future(distance: Tensor, response: Tensor, lo: int, hi: int | None = None) -> Tensor:
    """`(n, n)` bool, `t in T(s)`: row t is one of `response (n,)`, and `lo <= t - s <= hi` (None: to the end)."""
    n = distance.shape[-1]
    rows = (distance >= min(lo, n)) & response[:, None]
    return rows if hi is None else rows & (distance <= min(hi, n))


def fai(maps: Tensor, rows: Tensor) -> Tensor:
    """Eq. 10: `FAI[s]` is the mean over `t in T(s)` of `A[t, s]`; `rows (n, n)` is T. 0 where T(s) is empty."""
    return torch.where(rows, maps, 0.0).sum(dim=-2) / rows.sum(dim=-2).clamp(min=1)


def moments(maps: Tensor, rows: Tensor) -> ColumnMoments:
    """Moments of `A[t, s]` over `t in T(s)`; 0 where there are fewer than two rows or no variance."""
    count = rows.sum(dim=-2).to(maps.dtype).expand(maps[..., 0, :].shape)
    mean = torch.where(rows, maps, 0.0).sum(dim=-2) / count.clamp(min=1)
    central = torch.where(rows, maps - mean[..., None, :], 0.0)
    m2, m3, m4 = ((central**p).sum(dim=-2) / count.clamp(min=1) for p in (2, 3, 4))
    spread = (m2 * m2 != 0) & (count >= 2)  # True where m2 is NaN, so that the results are NaN there
    safe = torch.where(spread, m2, 1.0)
    variance = torch.where(count >= 2, m2, 0.0)
    skewness = torch.where(spread, m3 / safe**1.5, 0.0)
    kurtosis = torch.where(spread, m4 / safe**2, 0.0)
    return ColumnMoments(count, mean, variance, skewness, kurtosis)

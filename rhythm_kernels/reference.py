"""The dense definitions: every measure written beside the paper, at O(T^2) memory.

This file is what all other backends are tested against. It imports nothing of ours, favours reading over speed,
and keeps the precision of its inputs (float64 in, float64 out; anything narrower is raised to float32).
What an `lse` or a sink that is not finite does, :func:`attention_maps` says.
Equation numbers are those of arXiv 2510.13554v2. Shapes follow :mod:`rhythm_kernels.functional`:
``q (B, T, H, D)``, ``k (B, T, H_kv, D)``, ``lse (B, H, T)``, or packed with ``cu_seqlens``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AttentionStats",
    "ColumnMoments",
    "attention_lse",
    "attention_maps",
    "attention_with_rhythm",
    "column_moments",
    "fai",
    "rhythm_credit",
    "span",
    "waad",
]


class ColumnMoments(NamedTuple):
    """Count, mean, population variance, skewness and kurtosis (``m4 / m2**2``) of the attention a token receives."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls on moments
    mean: Tensor
    variance: Tensor
    skewness: Tensor
    kurtosis: Tensor


class AttentionStats(NamedTuple):
    """WAAD (eq. 9) and span (the summand of eq. 7) per token, beside an attention output."""

    waad: Tensor
    span: Tensor


class _Sequence(NamedTuple):
    """One live sequence: its row, its live range, its first response token, all counted in the row."""

    row: int
    start: int
    end: int
    response_start: int


def _sequences(
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    response_start: Tensor | None,
) -> list[_Sequence]:
    """The live sequences of a padded or packed batch, each with `start <= response_start <= end`."""
    if cu_seqlens is not None:
        bounds = [min(max(int(x), 0), length) for x in cu_seqlens]
        spans = [(0, a, max(a, b)) for a, b in itertools.pairwise(bounds)]
    else:
        starts = [0] * batch if seq_start is None else [int(x) for x in seq_start]
        ends = [length] * batch if seq_end is None else [int(x) for x in seq_end]
        spans = [(b, starts[b], max(starts[b], ends[b])) for b in range(batch)]
    first = [0] * len(spans) if response_start is None else [int(x) for x in response_start]
    if cu_seqlens is not None:
        first = [f + start for f, (_, start, _) in zip(first, spans, strict=True)]
    return [
        _Sequence(row, start, end, min(max(f, start), end)) for (row, start, end), f in zip(spans, first, strict=True)
    ]


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(
    q: Tensor,
    k: Tensor,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """The score rule of one sequence: `(n, H, D), (n, H_kv, D) -> (H, n, n)`, `-inf` where s is not visible to t."""
    n, heads, dim = q.shape
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    keys = _widen(k).repeat_interleave(heads // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):
        x = torch.einsum("thd,shd->hts", _widen(q), keys) * scale
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    return x.masked_fill(~_visible(n, window_size, q.device), float("-inf"))


def _visible(n: int, window_size: tuple[int, int], device: torch.device) -> Tensor:
    """`(n, n)` bool: whether row t sees key s."""
    distance = _distance(n, device)
    visible = distance >= 0
    if window_size[0] >= 0:
        visible &= distance <= min(window_size[0], n)
    return visible


def _distance(n: int, device: torch.device) -> Tensor:
    """`(n, n)` int64: t - s."""
    position = torch.arange(n, device=device)
    return position[:, None] - position[None, :]


def _lse(x: Tensor, sinks: Tensor | None) -> Tensor:
    """`(H, n, n) -> (H, n)`: log-sum-exp of each row, the sink in the denominator; NaN where it would be `+inf`."""
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
) -> Tensor:
    """`A (H, n, n)` of one sequence `q (n, H, D)`, `k (n, H_kv, D)`: what the softmax gives, nothing renormalised.

    With `lse (H, n)` given, `A = exp(x - lse)`. A row is NaN, at the keys it sees, where its `lse` is not finite or the
    sink of its head is `+inf` or NaN; a sink of `-inf` is none.
    """
    x = _logits(q, k, softmax_scale, window_size, softcap)
    lse = _lse(x, sinks) if lse is None else lse.to(x.dtype)
    known = lse.isfinite()
    if sinks is not None:
        known = known & (sinks < math.inf)[:, None]
    maps = torch.exp(x - torch.where(known, lse, math.nan)[..., None])
    return torch.where(_visible(len(q), window_size, q.device), maps, 0.0)


def _heads(heads: Tensor | Sequence[int] | None, total: int, device: torch.device) -> Tensor:
    if heads is None:
        return torch.arange(total, device=device)
    return torch.as_tensor(heads, device=device, dtype=torch.int64).reshape(-1)


def _measure(
    rule: Callable[[Tensor, _Sequence], Tensor],
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    heads: Tensor | Sequence[int] | None,
    per_head: bool,
    score: dict,
    ranges: dict,
    *planes: int,
) -> Tensor:
    """Apply `rule(A (Hs, n, n), sequence) -> (*planes, Hs, n)` to every sequence; results are laid out like the inputs.

    `(*planes, B, [Hs,] T)`, without `B` where the batch is packed; 0 where nothing was measured.
    """
    packed = ranges["cu_seqlens"] is not None
    if packed:
        q, k, lse = q[None], k[None], None if lse is None else lse[None]
    batch, length, n_heads, _ = q.shape
    index = _heads(heads, n_heads, q.device)
    out = torch.zeros((*planes, batch, len(index), length), dtype=_widen(q).dtype, device=q.device)
    for seq in _sequences(batch, length, **ranges):
        live = slice(seq.start, seq.end)
        if seq.end > seq.start:
            row_lse = None if lse is None else lse[seq.row, :, live]
            maps = attention_maps(q[seq.row, live], k[seq.row, live], row_lse, **score)[index]
            scored = slice(seq.response_start, seq.end)
            out[..., seq.row, :, scored] = rule(maps, seq)[..., seq.response_start - seq.start :]
    out = out if per_head else out.mean(dim=-2)
    return out.select(len(planes), 0) if packed else out


def _response_rows(n: int, seq: _Sequence, device: torch.device) -> Tensor:
    """`(n, 1)` bool: which rows (queries) belong to the response R."""
    return (torch.arange(n, device=device) >= seq.response_start - seq.start)[:, None]


def waad(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    window: int = 10,
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """Windowed average attention distance, eq. 9: `WAAD[t] = sum_s A[t, s] min(t - s, W)`."""

    def rule(maps: Tensor, seq: _Sequence) -> Tensor:
        limit = min(window, maps.shape[-1])
        distance = _distance(maps.shape[-1], maps.device).clamp(min=0, max=limit)
        # A given lse is rounded, so that a row may sum to a little more than 1.
        return (maps * distance).sum(dim=-1).clamp(0, limit)

    score = _score(softmax_scale, window_size, softcap, sinks)
    ranges = _ranges(cu_seqlens, seq_start, seq_end, response_start)
    return _measure(rule, q, k, lse, heads, per_head, score, ranges)


def fai(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    horizon: tuple[int, int | None] = (10, 100),
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """Future attention influence, eq. 10: mean over `t in T(s)` of `A[t, s]`; 0 where T(s) is empty.

    T(s) holds the rows of the response at distance `horizon[0] .. horizon[1]` (None: to the sequence's end).
    """

    def rule(maps: Tensor, seq: _Sequence) -> Tensor:
        n = maps.shape[-1]
        distance = _distance(n, maps.device)
        rows = (distance >= min(horizon[0], n)) & _response_rows(n, seq, maps.device)
        if horizon[1] is not None:
            rows &= distance <= min(horizon[1], n)
        total = torch.where(rows, maps, 0.0).sum(dim=1)
        return total / rows.sum(dim=0).clamp(min=1)

    score = _score(softmax_scale, window_size, softcap, sinks)
    ranges = _ranges(cu_seqlens, seq_start, seq_end, response_start)
    return _measure(rule, q, k, lse, heads, per_head, score, ranges)


def span(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """Average attention distance of each token, `sum_s A[t, s] (t - s)`; its mean over R is eq. 7."""

    def rule(maps: Tensor, seq: _Sequence) -> Tensor:
        return (maps * _distance(maps.shape[-1], maps.device).clamp(min=0)).sum(dim=-1)

    score = _score(softmax_scale, window_size, softcap, sinks)
    ranges = _ranges(cu_seqlens, seq_start, seq_end, response_start)
    return _measure(rule, q, k, lse, heads, per_head, score, ranges)


def column_moments(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    min_distance: int = 4,
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
    per_head: bool = False,
) -> ColumnMoments:
    """Moments of `A[t, s]` over the response rows `t >= s + min_distance` (what receiver heads are found by)."""
    score = _score(softmax_scale, window_size, softcap, sinks)
    ranges = _ranges(cu_seqlens, seq_start, seq_end, response_start)

    def rule(maps: Tensor, seq: _Sequence) -> Tensor:
        n = maps.shape[-1]
        rows = (_distance(n, maps.device) >= min(min_distance, n)) & _response_rows(n, seq, maps.device)
        count = rows.sum(dim=0).to(maps.dtype).expand(maps.shape[0], n)
        mean = torch.where(rows, maps, 0.0).sum(dim=1) / count.clamp(min=1)
        central = torch.where(rows, maps - mean[:, None, :], 0.0)
        m2, m3, m4 = ((central**p).sum(dim=1) / count.clamp(min=1) for p in (2, 3, 4))
        spread = (m2 * m2 != 0) & (count >= 2)  # NaN is not 0: it goes on into all three
        safe = torch.where(spread, m2, 1.0)
        variance = torch.where(count >= 2, m2, 0.0)
        skewness = torch.where(spread, m3 / safe**1.5, 0.0)
        kurtosis = torch.where(spread, m4 / safe**2, 0.0)
        return torch.stack(ColumnMoments(count, mean, variance, skewness, kurtosis))

    moments = _measure(rule, q, k, lse, heads, per_head, score, ranges, len(ColumnMoments._fields))
    return ColumnMoments(*moments.unbind(0))


def attention_lse(
    q: Tensor,
    k: Tensor,
    *,
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
) -> Tensor:
    """Natural log of each row's softmax denominator, `(B, H_selected, T)`; `-inf` on rows without keys."""
    packed = cu_seqlens is not None
    q4, k4 = (q[None], k[None]) if packed else (q, k)
    batch, length, n_heads, _ = q4.shape
    index = _heads(heads, n_heads, q.device)
    out = torch.full((batch, len(index), length), float("-inf"), dtype=_widen(q).dtype, device=q.device)
    for seq in _sequences(batch, length, cu_seqlens, seq_start, seq_end, response_start):
        if seq.end > seq.start:
            live = slice(seq.start, seq.end)
            x = _logits(q4[seq.row, live], k4[seq.row, live], softmax_scale, window_size, softcap)
            rows = _lse(x, sinks)[index]
            out[seq.row, :, seq.response_start : seq.end] = rows[:, seq.response_start - seq.start :]
    return out[0] if packed else out


def attention_with_rhythm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 10,
    heads: Tensor | Sequence[int] | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
    response_start: Tensor | None = None,
    per_head: bool = False,
) -> tuple[Tensor, Tensor, AttentionStats]:
    """Causal attention `out (B, T, H, D_v)` (differentiable), `lse (B, H, T)` and the statistics of `heads`.

    `out` and `lse` cover every live row; the statistics the response rows alone.
    """
    packed = cu_seqlens is not None
    q4, k4, v4 = (q[None], k[None], v[None]) if packed else (q, k, v)
    batch, length, n_heads, _ = q4.shape
    score = _score(softmax_scale, window_size, softcap, sinks)
    rows = []
    for row in range(batch):
        pieces, position = [], 0
        for seq in _sequences(batch, length, cu_seqlens, seq_start, seq_end, response_start):
            if seq.row == row and seq.end > seq.start:
                live = slice(seq.start, seq.end)
                maps = attention_maps(q4[row, live], k4[row, live], **score)
                values = _widen(v4[row, live]).repeat_interleave(n_heads // v4.shape[2], dim=1)
                pieces.append(values.new_zeros(seq.start - position, n_heads, v4.shape[3]))
                with torch.autocast(q.device.type, enabled=False):
                    pieces.append(torch.einsum("hts,shd->thd", maps, values))
                position = seq.end
        pieces.append(_widen(q4).new_zeros(length - position, n_heads, v4.shape[3]))
        rows.append(torch.cat(pieces))
    out = torch.stack(rows)
    ranges = _ranges(cu_seqlens, seq_start, seq_end, None)
    lse = attention_lse(q.detach(), k.detach(), **score, **ranges)
    detached = (q.detach(), k.detach())
    response = {**score, **ranges, "response_start": response_start, "heads": heads, "per_head": per_head}
    stats = AttentionStats(waad(*detached, window=window, **response), span(*detached, **response))
    return (out[0] if packed else out).to(v.dtype), lse, stats


def _score(softmax_scale: float | None, window_size: tuple[int, int], softcap: float, sinks: Tensor | None) -> dict:
    return {"softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap, "sinks": sinks}


def _ranges(
    cu_seqlens: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    response_start: Tensor | None,
) -> dict:
    return {
        "cu_seqlens": cu_seqlens,
        "seq_start": seq_start,
        "seq_end": seq_end,
        "response_start": response_start,
    }


def rhythm_credit(
    waad: Tensor,
    fai: Tensor,
    response_mask: Tensor,
    mode: str = "coupled",
    gamma_amp: float = 1.5,
    top: float = 0.4,
    alpha: float = 0.5,
    neighbors: int = 3,
    *,
    bottom: bool = False,
    entropy: Tensor | None = None,
    generator: torch.Generator | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """`gamma (B, T)` of eqs. 14 to 19, token by token: see :func:`rhythm_kernels.rhythm_credit`.

    Measures are compared in float32, or in float64 where one of them is; so are given thresholds. A draw belongs to
    the token it stands at, and gamma is computed in double and rounded once.
    """
    gamma = torch.ones(waad.shape, dtype=torch.float32, device=waad.device)
    draw = None
    if mode == "random":
        where = waad.device if generator is None else generator.device
        draw = torch.rand(waad.shape, dtype=torch.float32, generator=generator, device=where)
    for row in range(waad.shape[0]):
        tokens = [t for t in range(waad.shape[1]) if response_mask[row, t]]
        n, m = len(tokens), math.ceil(top * len(tokens) - 1e-9)
        measures = [waad, fai]
        if mode in ("entropy", "random"):
            choice = entropy if mode == "entropy" else draw
            assert choice is not None
            measures.append(choice)
        double = any(x.dtype == torch.float64 for x in measures)
        precision = torch.float64 if double else torch.float32
        widened = [x[row, tokens].to(precision) for x in measures]
        if n == 0 or not all(x.isfinite().all() for x in widened):
            continue
        delta = [*(widened[0][:-1] - widened[0][1:]).abs().tolist(), 0.0]  # eq. 14
        w, f, *rest = (x.tolist() for x in widened)
        everyone = range(n)
        heard = [t for t in everyone if f[t] > 0]
        t_loc = _top(delta, everyone, m, lowest=bottom and mode == "local")
        t_glob = _top(f, heard, m, lowest=bottom)

        bonus = [0.0] * n
        if mode == "local":  # eq. 15
            bonus = [float(t in t_loc) for t in everyone]
        elif mode == "global":  # eq. 17
            bonus = [float(t in t_glob) for t in everyone]
        elif mode in ("entropy", "random"):
            t_score = _top(rest[0], everyone, m, lowest=bottom and mode == "entropy")
            bonus = [float(t in t_score) for t in everyone]
        elif mode == "coupled":
            low = sorted(w)[(n - 1) // 2] if tau_waad is None else _rounded(tau_waad, precision)
            high = min((delta[t] for t in t_loc), default=math.inf)
            high = high if tau_delta is None else _rounded(tau_delta, precision)
            dominated, intros = set(), set()
            for t in t_glob:  # eq. 18
                before = range(max(0, t - neighbors), t)
                if len(before) > 0 and w[t] <= low and max(delta[u] for u in before) >= high:
                    dominated.add(t)
                    intros.add(max(before, key=lambda u: (delta[u], u)))
            for t in everyone:  # eq. 19
                bonus[t] += float(t in t_glob and t not in dominated)
                bonus[t] += (1 - alpha) * (t in dominated)
                bonus[t] += alpha * (t in intros)
        factors = [1 + (gamma_amp - 1) * b for b in bonus]
        gamma[row, tokens] = torch.tensor(factors, dtype=torch.float32, device=gamma.device)
    return gamma


def _rounded(threshold: float, precision: torch.dtype) -> float:
    """A given threshold as a measure of that precision would hold it: the one it is compared with."""
    return float(torch.tensor(threshold, dtype=precision, device="cpu"))


def _top(x: list[float], among: Iterable[int], m: int, *, lowest: bool) -> set[int]:
    """`TopQ`: the `m` highest (or lowest) of `x` among some tokens; ties go to the earlier."""
    return set(sorted(among, key=lambda t: (x[t] if lowest else -x[t], t))[:m])

"""The formulas for a padded or packed batch: applied to each sequence, its selected heads and its response."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack  # comes with torch; of typing since Python 3.11

from ..options import DEFAULTS, Options, check_names, spelled_out
from ..settings import RhythmSettings
from . import formulas
from .formulas import ColumnMoments, widen


class AttentionStats(NamedTuple):
    """WAAD (eq. 9) and span (the summand of eq. 7) per token, as :func:`attention_with_rhythm` returns them."""

    waad: Tensor
    span: Tensor


class MeasureLayout(Options, total=False):
    """What a measure takes by keyword: the shared arguments, and whether results are per head or their mean."""

    per_head: bool


_RULE = ("softmax_scale", "window_size", "softcap", "sinks", "alibi_slopes")


def _complete(name: str, layout: Any, takes: type = MeasureLayout) -> dict[str, Any]:
    """`layout` with the defaults filled in; an argument that `takes` lacks is a TypeError of the function `name`."""
    check_names(name, layout, takes)
    return DEFAULTS | layout


class _Sequence(NamedTuple):
    """One sequence, as the formulas take it."""

    q: Tensor  # (n, H, D)
    k: Tensor  # (n, H_kv, D)
    lse: Tensor | None  # (H, n)
    at: tuple[int | slice, ...]  # the index of its tokens in q, k and v
    rule: dict[str, Any]
    heads: Tensor | slice  # (Hs,), those that are measured
    response: Tensor  # (n,) bool, whether a token is in the response R

    @property
    def maps(self) -> Tensor:
        """`A (Hs, n, n)`."""
        return formulas.attention_maps(self.q, self.k, self.lse, **self.rule)[self.heads]

    @property
    def own_lse(self) -> Tensor:
        """`(Hs, n)`."""
        rule = dict(self.rule)
        sinks = rule.pop("sinks")
        return formulas.row_lse(formulas.logits(self.q, self.k, **rule), sinks)[self.heads]

    @property
    def distance(self) -> Tensor:
        return formulas.distances(len(self.q), self.q.device)

    def future(self, lo: int, hi: int | None = None) -> Tensor:
        """`(n, n)` bool: T(s)."""
        return formulas.future(self.distance, self.response, lo, hi)


def _table(batch: int, length: int, layout: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """The sequence table: batch row, start, end and response start, which is clamped to `start <= ... <= end`."""
    cu_seqlens, response = layout["cu_seqlens"], layout["response_start"]
    if cu_seqlens is not None:
        bounds = [min(max(int(x), 0), length) for x in cu_seqlens]
        ranges = [(0, a, max(a, b)) for a, b in itertools.pairwise(bounds)]
    else:
        starts = [0] * batch if layout["seq_start"] is None else [int(x) for x in layout["seq_start"]]
        ends = [length] * batch if layout["seq_end"] is None else [int(x) for x in layout["seq_end"]]
        ranges = [(b, starts[b], max(starts[b], ends[b])) for b in range(batch)]
    first = [0] * len(ranges) if response is None else [int(x) for x in response]
    if cu_seqlens is not None:
        first = [f + start for f, (_, start, _) in zip(first, ranges, strict=True)]
    return [(b, start, end, min(max(f, start), end)) for (b, start, end), f in zip(ranges, first, strict=True)]


def _batch_rows(
    formula: Callable[[_Sequence], Tensor],
    blank: Callable[[int], Tensor],
    layout: dict[str, Any],
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    dim: int = -1,
) -> list[Tensor]:
    """For each batch row (one, where the batch is packed): `formula(sequence)` of its sequences, joined along `dim`,
    their dimension of tokens, with `blank(n)` for n tokens before, between and after the sequences."""
    packed = layout["cu_seqlens"] is not None
    batch, length = (1, len(q)) if packed else q.shape[:2]
    heads: Tensor | slice = slice(None)
    if layout["heads"] is not None:
        heads = torch.as_tensor(layout["heads"], device=q.device, dtype=torch.int64).reshape(-1)
    rule = {name: layout[name] for name in _RULE}
    pieces: list[list[Tensor]] = [[] for _ in range(batch)]
    done = [0] * batch  # how many tokens of each batch row its pieces cover
    slopes = rule["alibi_slopes"]
    for i, (b, start, end, first) in enumerate(_table(batch, length, layout)):
        if end > start:
            at = (slice(start, end),) if packed else (b, slice(start, end))
            response = torch.arange(start, end, device=q.device) >= first
            own_lse = None if lse is None else lse[(*at[:-1], slice(None), at[-1])]
            own = rule if slopes is None or slopes.dim() == 1 else rule | {"alibi_slopes": slopes[i]}
            values = formula(_Sequence(q[at], k[at], own_lse, at, own, heads, response))
            pieces[b] += [blank(start - done[b]), values]
            done[b] = end
    return [torch.cat([*piece, blank(length - n)], dim) for piece, n in zip(pieces, done, strict=True)]


def _measured(
    formula: Callable[[_Sequence], Tensor],
    layout: dict[str, Any],
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    planes: tuple[int, ...] = (),
    fill: float = 0.0,
) -> Tensor:
    """`formula(sequence)`, `(*planes, Hs, n)`, at the response's tokens and `fill` at all others.

    Returns `(*planes, B, [Hs,] T)`, without `B` where the batch is packed, and without `Hs` where the mean is asked.
    """
    heads = q.shape[-2] if layout["heads"] is None else torch.as_tensor(layout["heads"]).numel()

    def blank(n: int) -> Tensor:
        return widen(q).new_full((*planes, heads, n), fill)

    batch_rows = _batch_rows(lambda x: torch.where(x.response, formula(x), fill), blank, layout, q, k, lse)
    out = torch.stack(batch_rows, len(planes))
    out = out if layout["per_head"] else out.mean(dim=-2)
    return out.select(len(planes), 0) if layout["cu_seqlens"] is not None else out


@spelled_out(MeasureLayout)
def waad(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    window: int = RhythmSettings.window,
    **layout: Unpack[MeasureLayout],
) -> Tensor:
    """Windowed average attention distance, eq. 9: `WAAD[t] = sum_s A[t, s] min(t - s, W)`."""
    return _measured(lambda x: formulas.waad(x.maps, x.distance, window), _complete("waad", layout), q, k, lse)


@spelled_out(MeasureLayout)
def fai(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    horizon: tuple[int, int | None] = RhythmSettings.horizon,
    **layout: Unpack[MeasureLayout],
) -> Tensor:
    """Future attention influence, eq. 10: mean over `t in T(s)` of `A[t, s]`; 0 where T(s) is empty.

    T(s) holds the rows of the response at distance `horizon[0] .. horizon[1]` (None: to the sequence's end).
    """
    return _measured(lambda x: formulas.fai(x.maps, x.future(*horizon)), _complete("fai", layout), q, k, lse)


@spelled_out(MeasureLayout)
def span(q: Tensor, k: Tensor, lse: Tensor | None = None, **layout: Unpack[MeasureLayout]) -> Tensor:
    """Average attention distance of each token, `sum_s A[t, s] (t - s)`; its mean over R is eq. 7."""
    return _measured(lambda x: formulas.span(x.maps, x.distance), _complete("span", layout), q, k, lse)


@spelled_out(MeasureLayout)
def column_moments(
    q: Tensor, k: Tensor, lse: Tensor | None = None, *, min_distance: int = 4, **layout: Unpack[MeasureLayout]
) -> ColumnMoments:
    """Moments of `A[t, s]` over the response rows `t >= s + min_distance`, which find receiver heads."""

    def formula(x: _Sequence) -> Tensor:
        return torch.stack(formulas.moments(x.maps, x.future(min_distance)))

    planes = (len(ColumnMoments._fields),)
    return ColumnMoments(*_measured(formula, _complete("column_moments", layout), q, k, lse, planes=planes))


@spelled_out(Options)
def attention_lse(q: Tensor, k: Tensor, **layout: Unpack[Options]) -> Tensor:
    """The natural log of each row's softmax denominator, `(B, H_selected, T)`; `-inf` outside of the response."""
    arguments = _complete("attention_lse", layout, Options) | {"per_head": True}
    return _measured(lambda x: x.own_lse, arguments, q, k, fill=-math.inf)


@spelled_out(MeasureLayout)
def attention_with_rhythm(
    q: Tensor, k: Tensor, v: Tensor, *, window: int = RhythmSettings.window, **layout: Unpack[MeasureLayout]
) -> tuple[Tensor, Tensor, AttentionStats]:
    """Causal attention `out (B, T, H, D_v)`, differentiable; `lse (B, H, T)`; WAAD and span of `heads`.

    `out` and `lse` are of every live token and all heads, WAAD and span of the response alone.
    """
    arguments = _complete("attention_with_rhythm", layout)
    whole = arguments | {"heads": None, "response_start": None, "per_head": True}

    def blank(n: int) -> Tensor:
        return widen(q).new_zeros(n, q.shape[-2], v.shape[-1])

    out = torch.stack(_batch_rows(lambda x: formulas.attention(x.maps, v[x.at]), blank, whole, q, k, dim=0))
    out = out[0] if whole["cu_seqlens"] is not None else out
    # Adds 0, an empty sum: where no token is live, out still has gradients, which are 0.
    out = out + sum(widen(x[:0]).sum() for x in (q, k, v))
    measured = q.detach(), k.detach()
    lse = _measured(lambda x: x.own_lse, whole, *measured, fill=-math.inf)
    stats = AttentionStats(waad(*measured, window=window, **layout), span(*measured, **layout))
    return out.to(v.dtype), lse, stats

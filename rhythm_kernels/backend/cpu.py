"""The compiled CPU passes and credit (`csrc/cpu`), on the extension that :mod:`.extension` loads.

Attention itself is torch's (:mod:`.tiled_torch.attention`); its statistics are the compiled row pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .tiled_torch.attention import forward
from .tiled_torch.credit import gamma_levels
from .tiled_torch.passes import attention_backward as attention_backward  # whichever pass made the statistics

__all__ = [
    "attention",
    "attention_backward",
    "available",
    "band_columns",
    "band_rows",
    "column_stats",
    "credit",
    "row_stats",
]


def available(device: torch.device) -> str:
    """The reason why the compiled passes cannot run on tensors of this device; empty where they can."""
    return extension.unusable() if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"


def _per_token(q: Tensor, heads: Tensor, per_head: bool, *planes: int) -> Tensor:
    """Memory for `(*planes, B, [Hs,] T)` float32; the op writes all of it."""
    shape = (*planes, q.shape[0], *((heads.shape[0],) if per_head else ()), q.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _within(distance: int, q: Tensor) -> int:
    """The same measure by a distance no larger than the length: `W - (W - d)` cancels where W is large."""
    return min(distance, q.shape[1])


def band_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> Tensor:
    """WAAD (eq. 9), `(B, [Hs,] T)`: `W rowsum - sum A (W - (t - s))` over the last `window` keys of each row."""
    out = _per_token(q, heads, per_head)
    rule = (seqs, heads, _within(max_seqlen, q), scale, softcap, _within(window_left, q), sinks)
    extension.registered().band_rows(q, k, lse, *rule, _within(window, q), per_head, out)
    return out


def band_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    lo: int,
    hi: int,
    per_head: bool,
) -> Tensor:
    """FAI (eq. 10), `(B, [Hs,] T)`: the mean of A over the rows at distance `lo .. hi` after each key."""
    out = _per_token(q, heads, per_head)
    rule = (seqs, heads, _within(max_seqlen, q), scale, softcap, _within(window_left, q), sinks)
    extension.registered().band_columns(q, k, lse, *rule, _within(lo, q), _within(hi, q), per_head, out)
    return out


def row_stats(
    q: Tensor,
    k: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp `(B, Hs, T)`, WAAD and span `(B, [Hs,] T)` of each row, in one pass over its keys."""
    lse = _per_token(q, heads, True)
    waad, span = _per_token(q, heads, per_head), _per_token(q, heads, per_head)
    rule = (seqs, heads, _within(max_seqlen, q), scale, softcap, _within(window_left, q), sinks)
    extension.registered().row_stats(q, k, *rule, _within(window, q), per_head, lse, waad, span)
    return lse, waad, span


def column_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    min_distance: int,
    moments: bool,
    per_head: bool,
) -> Tensor:
    """`(1, B, [Hs,] T)` mean of A over the rows `t >= s + min_distance`, or with `moments` `(5, B, [Hs,] T)`.

    The five are count, mean, population variance, skewness and kurtosis (`m4 / m2**2`).
    """
    out = _per_token(q, heads, per_head, 5 if moments else 1)
    rule = (seqs, heads, _within(max_seqlen, q), scale, softcap, _within(window_left, q), sinks)
    extension.registered().column_stats(q, k, lse, *rule, _within(min_distance, q), moments, per_head, out)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqs: Tensor,
    heads: Tensor,
    max_seqlen: int,
    scale: float,
    softcap: float,
    window_left: int,
    sinks: Tensor | None,
    window: int,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, log-sum-exp, WAAD and span: torch's own attention and the compiled row pass."""
    rule = (scale, softcap, window_left, sinks)
    out, lse = forward(q, k, v, seqs, *rule)
    _, waad, span = row_stats(q, k, seqs, heads, max_seqlen, *rule, window, per_head)
    return out, lse, waad, span


def credit(
    waad: Tensor,
    fai: Tensor,
    score: Tensor | None,
    mask: Tensor,
    mode: str,
    gamma_amp: float,
    top: float,
    alpha: float,
    neighbors: int,
    bottom: bool,
    tau_waad: float | None,
    tau_delta: float | None,
) -> Tensor:
    """Gamma (eqs. 14 to 19), `(B, T)` float32, each response by one thread."""
    out = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    levels = gamma_levels(gamma_amp, alpha)
    extension.registered().credit(
        waad, fai, score, mask, mode, top, neighbors, bottom, tau_waad, tau_delta, levels, out
    )
    return out

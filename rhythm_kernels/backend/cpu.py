"""The compiled CPU passes and credit (`csrc/cpu`), on the extension that :mod:`.extension` loads.

Attention itself is torch's (:mod:`.tiled_torch.attention`); its statistics are the compiled row pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import Attended, Choice, RowStats, Rule, per_token
from . import extension
from .tiled_torch.attention import attention_backward, forward

__all__ = [
    "attention", "attention_backward", "available", "band_columns", "band_rows", "column_stats", "credit", "row_stats",
]  # fmt: skip


def available(device: torch.device) -> str:
    """The reason why the compiled passes cannot run on tensors of this device; empty where they can."""
    return extension.unusable() if device.type == "cpu" else f"it serves CPU tensors, not {device.type}"


def band_rows(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    """WAAD (eq. 9), `(B, [Hs,] T)`: `W rowsum - sum A (W - (t - s))` over the last `window` keys of each row."""
    out = per_token(q, rule, per_head)
    extension.registered().band_rows(q, k, lse, *rule, window, per_head, out)
    return out


def band_columns(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
    """FAI (eq. 10), `(B, [Hs,] T)`: the mean of A over the rows at distance `lo .. hi` after each key."""
    out = per_token(q, rule, per_head)
    extension.registered().band_columns(q, k, lse, *rule, lo, hi, per_head, out)
    return out


def row_stats(q: Tensor, k: Tensor, rule: Rule, window: int, per_head: bool) -> RowStats:
    """Log-sum-exp, WAAD and span of each row, in one pass over its keys."""
    lse, waad, span = (per_token(q, rule, each) for each in (True, per_head, per_head))
    extension.registered().row_stats(q, k, *rule, window, per_head, lse, waad, span)
    return RowStats(lse, waad, span)


def column_stats(
    q: Tensor, k: Tensor, lse: Tensor, rule: Rule, min_distance: int, moments: bool, per_head: bool
) -> Tensor:  # fmt: skip
    """`(1, B, [Hs,] T)` mean of A over the rows `t >= s + min_distance`, or with `moments` `(5, B, [Hs,] T)`.

    The five are count, mean, population variance, skewness and kurtosis (`m4 / m2**2`).
    """
    out = per_token(q, rule, per_head, 5 if moments else 1)
    extension.registered().column_stats(q, k, lse, *rule, min_distance, moments, per_head, out)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, per_head: bool) -> Attended:
    """Attention, log-sum-exp, WAAD and span: torch's own attention and the compiled row pass."""
    _, waad, span = row_stats(q, k, rule, window, per_head)
    return Attended(*forward(q, k, v, rule), waad, span)


def credit(waad: Tensor, fai: Tensor, score: Tensor | None, mask: Tensor, choice: Choice) -> Tensor:
    """Gamma (eqs. 14 to 19), `(B, T)` float32, each response by one thread."""
    out = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    extension.registered().credit(waad, fai, score, mask, *choice, out)
    return out

"""Tile-wise torch: the backend for every device, which needs neither a compiler nor Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rule import Attended, Rule
from .attention import attention_backward, forward
from .credit import credit
from .passes import band_columns, band_rows, column_stats, row_stats

__all__ = [
    "attention", "attention_backward", "available", "band_columns", "band_rows", "column_stats", "credit", "row_stats",
]  # fmt: skip


def available(device: torch.device) -> str:
    """Empty, "no reason": torch itself runs on every device."""
    return ""


def attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, per_head: bool) -> Attended:
    """Attention, log-sum-exp, WAAD and span: torch's own attention and the row pass."""
    _, waad, span = row_stats(q, k, rule, window, per_head)
    return Attended(*forward(q, k, v, rule), waad, span)

"""Tile-wise torch: the backend that is there where neither compiler nor Triton is, on every device."""

from __future__ import annotations

import torch

from .credit import credit
from .passes import attention, attention_backward, band_columns, band_rows, column_stats, row_stats

__all__ = [
    "attention", "attention_backward", "available", "band_columns", "band_rows", "column_stats", "credit", "row_stats",
]  # fmt: skip


def available(device: torch.device) -> str:
    """Nothing keeps it from running: it is torch."""
    return ""

"""Passes and credit as `torch.ops.rhythm_kernels.*`: schema, fake kernel and dispatch; the backends compute."""

from .attention import attention
from .band_columns import band_columns
from .band_rows import band_rows
from .column_stats import column_stats
from .credit import credit
from .dispatch import BACKENDS, backends, choose
from .row_stats import row_stats

__all__ = [
    "BACKENDS",
    "attention",
    "backends",
    "band_columns",
    "band_rows",
    "choose",
    "column_stats",
    "credit",
    "row_stats",
]

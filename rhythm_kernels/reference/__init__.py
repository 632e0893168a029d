"""The dense definitions: every measure written beside the paper, at O(T^2) memory.

This is what all backends are tested against. It imports nothing of ours, favours reading over speed, and keeps the
precision of its inputs (float64 in, float64 out; anything narrower is raised to float32). `formulas` has what the paper
writes, of one sequence; `measures` lays it out over padded and packed batches; `credit` is gamma, token by token.
What an `lse` or a sink that is not finite does, :func:`attention_maps` says.
Equation numbers are those of arXiv 2510.13554v2. Shapes follow :mod:`rhythm_kernels.functional`:
``q (B, T, H, D)``, ``k (B, T, H_kv, D)``, ``lse (B, H, T)``, or packed with ``cu_seqlens``.
"""

from .credit import rhythm_credit
from .formulas import ColumnMoments, attention_maps
from .measures import AttentionStats, attention_lse, attention_with_rhythm, column_moments, fai, span, waad

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

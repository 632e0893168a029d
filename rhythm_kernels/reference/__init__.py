"""The dense definitions: every measure as the paper writes it, with complete attention maps in O(T^2) memory.

All backends are tested against these. They use nothing of the other modules but the declarations of arguments and their
defaults (:mod:`rhythm_kernels.options`, :mod:`rhythm_kernels.settings`), are written to be read rather than fast, and
compute in float64 where the inputs are float64, else in float32. `formulas` has the paper's formulas for one sequence;
`measures` applies them to padded and packed batches; `credit` is gamma, token by token. :func:`attention_maps` says
what an `lse` or a sink that is not finite does. Equation numbers are those of arXiv 2510.13554v2. Shapes are those of
:mod:`rhythm_kernels.functional`: ``q (B, T, H, D)``, ``k (B, T, H_kv, D)``, ``lse (B, H, T)``, or packed with
``cu_seqlens``.
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

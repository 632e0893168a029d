"""Attention-rhythm measures out of FlashAttention, and GRPO credit from them.

`import rhythm_kernels as rk` needs torch alone and touches no device; what needs transformers, Triton or TRL is
loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import layouts, reference
from .functional import attention_lse, attention_with_rhythm, column_moments, fai, span, waad
from .ops import backends
from .reference import AttentionStats, ColumnMoments
from .settings import RhythmSettings

if TYPE_CHECKING:
    from .backend.extension import build_info
    from .credit import rhythm_credit, shape_advantages
    from .heads import HeadGroups
    from .measured_credit import RhythmCredit
    from .probe import RhythmProbe, head_groups

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "ColumnMoments",
    "HeadGroups",
    "RhythmCredit",
    "RhythmProbe",
    "RhythmSettings",
    "attention_lse",
    "attention_with_rhythm",
    "backends",
    "build_info",
    "column_moments",
    "fai",
    "head_groups",
    "layouts",
    "reference",
    "rhythm_credit",
    "shape_advantages",
    "span",
    "waad",
]

_LAZY = {
    "HeadGroups": "heads",
    "RhythmCredit": "measured_credit",
    "RhythmProbe": "probe",
    "build_info": "backend.extension",
    "head_groups": "probe",
    "rhythm_credit": "credit",
    "shape_advantages": "credit",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

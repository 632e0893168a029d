"""Rhythm measures of a transformers model, taken in a forward pass that is made anyway."""

from .calibration import head_groups
from .probe import RhythmProbe

__all__ = ["RhythmProbe", "head_groups"]

"""Rhythm measures of a transformers model, taken in a forward pass that is made anyway."""

from .probe import RhythmProbe

__all__ = ["RhythmProbe"]

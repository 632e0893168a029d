"""The line in the log by which an adapter says that it is at work.

A run without credit looks like one with credit, but for what it learns: so every adapter says so where users look.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from ..heads import HeadGroups
from ..settings import RhythmSettings

__all__ = ["announce", "spelled"]

_LOGGER = logging.getLogger("rhythm_kernels")


def announce(adapter: str, settings: RhythmSettings, where: str) -> None:
    """Log, at level INFO of the logger `rhythm_kernels`, that an adapter gives credit. For the main process alone.

    Where nobody configured logging the line goes to standard error, as Python would drop it.

    Args:
        adapter: what gives credit, with the version of its trainer: `RhythmGRPOTrainer (TRL 1.16.0)`.
        settings: what credit is made by.
        where: the forward that is measured, in words: `the old-log-prob pass`.
    """
    line = f"rhythm credit is on in {adapter}: {spelled(settings)}"
    if settings.mode == "uniform":
        line = f"rhythm credit is off in {adapter}: mode=uniform, every token has the same advantage"
    elif settings.reads_attention:
        line += f"; attention is measured in {where}"
    _LOGGER.setLevel(min(_LOGGER.getEffectiveLevel(), logging.INFO))
    if _LOGGER.hasHandlers():
        _LOGGER.info(line)
    else:
        print(f"rhythm_kernels: {line}", file=sys.stderr, flush=True)


def spelled(settings: RhythmSettings) -> str:
    """The settings in the words of the environment variable: `mode=coupled, gamma_amp=1.5, ...`, all of them."""
    words = []
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if isinstance(value, HeadGroups):
            word = f"{len(value.local)} local and {len(value.global_)} global heads"
        elif isinstance(value, tuple | list):
            word = ":".join("null" if part is None else str(part) for part in value)
        else:
            word = "null" if value is None else str(value)
        words.append(f"{setting.name}={word}")
    return ", ".join(words)

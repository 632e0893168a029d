"""Settings of credit from an environment variable, for trainers whose configuration has no place for them.

    RHYTHM_CREDIT="mode=coupled,gamma_amp=1.5,horizon=10:100"

Commas stand between the settings of :class:`rhythm_kernels.RhythmSettings`, `:` between the parts of a list, and `null`
for no value. What is not named keeps its default.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ..settings import RhythmSettings

__all__ = ["VARIABLE", "settings_from_environment"]

VARIABLE = "RHYTHM_CREDIT"

_NAMES = [setting.name for setting in dataclasses.fields(RhythmSettings)]
_WORDS = ("mode", "sign", "groups")  # taken as they are written: a path may be all digits
_LISTS = ("layers", "horizon")


def settings_from_environment() -> RhythmSettings | None:
    """The settings that `RHYTHM_CREDIT` spells; None where it is not set. Set and empty, it means the defaults.

    Raises:
        ValueError: for a name that is no setting, one that stands there twice, and a value that is out of its range.
    """
    spelled = os.environ.get(VARIABLE)
    if spelled is None:
        return None
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, spelled.split(","))):
        name, equals, word = map(str.strip, part.partition("="))
        if not equals or name not in _NAMES:
            raise ValueError(
                f"{VARIABLE} must be NAME=VALUE,... with names out of {', '.join(_NAMES)}, got {part!r} in {spelled!r}"
            )
        if name in values:
            raise ValueError(f"{VARIABLE} must name {name} once, got {spelled!r}")
        values[name] = _value(name, word)
    try:
        settings = RhythmSettings(**values)
        settings.load_groups()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{VARIABLE}: {error} in {spelled!r}") from error
    return settings


def _value(name: str, word: str) -> Any:
    if name in _LISTS and word not in ("middle5", "all"):
        return [_number(part) for part in word.split(":")]
    if name in _WORDS:
        return None if word == "null" else word
    return _number(word)


def _number(word: str) -> Any:
    """An integer, a float or None; any other word as it is, for the settings to refuse."""
    if word == "null":
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word

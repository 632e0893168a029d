"""Where :mod:`rhythm_kernels.integrations.trl` has its settings from: a configuration, an argument, the environment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ...settings import RhythmSettings
from ..environment import VARIABLE, settings_from_environment
from .refusals import refuse_blind_credit

__all__ = ["RhythmFields", "RhythmGRPOConfig", "settings_of"]

_SETTINGS = {setting.name: setting for setting in dataclasses.fields(RhythmSettings)}


class _Distance(int):
    """How a command line's word for a distance is read: an integer, or `null` (as in YAML) for no end."""

    def __new__(cls, word: str) -> Any:
        return None if word == "null" else int(word)


def _as_in_settings(name: str) -> Any:
    """A field with the default and the help of the setting `name`. (A command line reads no `default` of a list.)"""
    setting = _SETTINGS[name]
    default: Any = {"default_factory": lambda: setting.default} if name == "horizon" else {"default": setting.default}
    return field(**default, metadata=dict(setting.metadata))


@dataclass
class RhythmFields:
    """As `rhythm_NAME`, the settings NAME of :class:`rhythm_kernels.RhythmSettings`, for a configuration to extend.

        @dataclass  # without it the fields of the other are not known
        class MyConfig(RhythmFields, TheirGRPOConfig):
            pass

    They may change while a trainer trains, by a callback: the next batch goes by them.

    Raises:
        TypeError, ValueError: at construction, for a setting out of its range, and a loss that would not see credit.
    """

    rhythm_mode: str = _as_in_settings("mode")
    rhythm_gamma_amp: float = _as_in_settings("gamma_amp")
    rhythm_top: float = _as_in_settings("top")
    rhythm_alpha: float = _as_in_settings("alpha")
    rhythm_neighbors: int = _as_in_settings("neighbors")
    rhythm_window: int = _as_in_settings("window")
    rhythm_horizon: list[_Distance] = _as_in_settings("horizon")  # noqa: RUF009
    rhythm_layers: str = _as_in_settings("layers")
    rhythm_head_quantile: float = _as_in_settings("head_quantile")
    rhythm_groups: str | None = _as_in_settings("groups")
    rhythm_regroup_steps: int = _as_in_settings("regroup_steps")
    rhythm_sign: str = _as_in_settings("sign")

    def __post_init__(self) -> None:
        following = getattr(super(), "__post_init__", None)  # of the configuration that this is mixed into
        if following is not None:
            following()
        settings = self.rhythm_settings()
        if hasattr(self, "importance_sampling_level"):
            refuse_blind_credit(self, settings)
        try:
            settings.load_groups()
        except ValueError as error:
            raise ValueError(f"rhythm_{error}") from error

    def rhythm_settings(self) -> RhythmSettings:
        """The settings of the credit as they are now.

        Raises:
            TypeError, ValueError: one that is out of its range.
        """
        try:
            return RhythmSettings(**{name: getattr(self, f"rhythm_{name}") for name in _SETTINGS})
        except (TypeError, ValueError) as error:
            raise type(error)(f"rhythm_{error}") from error
        except AttributeError as error:
            raise TypeError(f"{type(self).__name__} must be a dataclass: put @dataclass on it") from error


@dataclass
class RhythmGRPOConfig(RhythmFields, GRPOConfig):
    """TRL's `GRPOConfig` with the settings of credit: :class:`RhythmFields`."""


def settings_of(args: Any, given: RhythmSettings | None) -> tuple[RhythmSettings, str]:
    """The settings of a trainer's credit, and where they are from, in words.

    Args:
        args: the trainer's configuration; None where it makes one itself.
        given: the trainer's argument `rhythm`.

    Raises:
        TypeError: none, both, or none of these types.
        ValueError: settings that `RHYTHM_CREDIT` misspells.
    """
    if given is not None and not isinstance(given, RhythmSettings):
        raise TypeError(f"rhythm must be a RhythmSettings, got {type(given).__name__}")
    if hasattr(args, "rhythm_settings"):
        if given is not None:
            raise TypeError(f"rhythm must be left out beside a {type(args).__name__}, got both: that has the settings")
        return args.rhythm_settings(), type(args).__name__
    if given is not None:
        return given, "the argument rhythm"
    settings = settings_from_environment()
    if settings is None:
        raise TypeError(
            f"args must be a RhythmGRPOConfig, got {type(args).__name__}: or one that extends RhythmFields; or hand "
            f"over rhythm=RhythmSettings(...), or set the environment variable {VARIABLE}"
        )
    return settings, VARIABLE

"""The configuration of :mod:`rhythm_kernels.integrations.trl`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..settings import RhythmSettings

__all__ = ["RhythmGRPOConfig"]

_SETTINGS = {setting.name: setting for setting in dataclasses.fields(RhythmSettings)}

# Losses of TRL in which a token's advantage multiplies that token's own log-probability, whatever the ratio's level.
_TOKENWISE_LOSSES = ("cispo", "vespo")


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
class RhythmGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and, as `rhythm_NAME`, the settings NAME of :class:`rhythm_kernels.RhythmSettings`."""

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
        super().__post_init__()
        self.refuse_blind_credit()
        self.rhythm_settings()

    def rhythm_settings(self) -> RhythmSettings:
        """The settings of the credit, with their groups.

        Raises:
            TypeError, ValueError: one that is out of its range, or a file of groups that is none.
        """
        try:
            settings = RhythmSettings(**{name: getattr(self, f"rhythm_{name}") for name in _SETTINGS})
            settings.load_groups()
        except (TypeError, ValueError) as error:
            raise type(error)(f"rhythm_{error}") from error
        return settings

    def refuse_blind_credit(self) -> None:
        """Raise where the loss would not see which tokens the credit chose.

        With one ratio for a whole response, its gradient is that of the ratio times the sum of the advantages. Losses
        that multiply each token's own log-probability keep the tokens apart at either level.
        """
        level, loss = self.importance_sampling_level, self.loss_type
        if self.rhythm_mode == "uniform" or level == "token" or loss in _TOKENWISE_LOSSES:
            return
        raise ValueError(
            f"importance_sampling_level must be 'token' for rhythm_mode={self.rhythm_mode!r} with loss_type={loss!r}, "
            f"got {level!r}: there all tokens of a response share one ratio, and credit would vanish into its mean "
            "over the response: which tokens it chose would change nothing. Or set loss_type to one of "
            f"{', '.join(map(repr, _TOKENWISE_LOSSES))}, or rhythm_mode to 'uniform'"
        )

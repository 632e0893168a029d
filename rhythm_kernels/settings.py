"""The settings of rhythm credit. Their defaults stand here and nowhere else, and so do the checks of what they may be.

Functions, the probe, trainers' configurations and recipes read the defaults off the class (`RhythmSettings.window`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from .arguments import as_int, check_horizon, check_int, check_number, check_window
from .heads import HeadGroups

__all__ = ["CREDIT_MODES", "SIGNS", "CreditMode", "RhythmSettings", "Sign"]

CreditMode = Literal["local", "global", "coupled", "random", "entropy", "uniform"]
CREDIT_MODES: tuple[str, ...] = get_args(CreditMode)
Sign = Literal["both", "positive", "negative"]
SIGNS: tuple[str, ...] = get_args(Sign)


def _help(meaning: str) -> dict[str, str]:
    """What command lines show of a setting."""
    return {"help": meaning}


@dataclass(frozen=True, kw_only=True)
class RhythmSettings:
    """What is measured of a model and what credit is made of it: checks itself, and `dataclasses.replace` changes it.

    More on `mode` to `neighbors` is at :func:`rhythm_kernels.rhythm_credit`, on `window` and `horizon` at
    :class:`rhythm_kernels.RhythmProbe`, on `layers` and `head_quantile` at :func:`rhythm_kernels.head_groups`, and on
    `sign` at :func:`rhythm_kernels.shape_advantages`.

    Raises:
        TypeError, ValueError: a setting that is out of its range or of another type.

    Attributes:
    """

    mode: CreditMode = field(
        default="coupled", metadata=_help("Which tokens get more credit; `uniform` is plain GRPO.")
    )
    gamma_amp: float = field(default=1.5, metadata=_help("Gamma of a chosen token; its bonus is gamma_amp - 1."))
    top: float = field(default=0.4, metadata=_help("Share of the tokens of a response that are chosen."))
    alpha: float = field(default=0.5, metadata=_help("Share of its bonus that a dominated anchor gives away."))
    neighbors: int = field(default=3, metadata=_help("How many tokens before an anchor may have introduced it."))
    window: int = field(default=10, metadata=_help("How far WAAD looks back, in tokens (W)."))
    horizon: tuple[int, int | None] = field(
        default=(10, 100),
        metadata=_help("First and last distance of FAI, in tokens; last None (`null`): to the end."),
    )
    layers: str | Sequence[int] = field(default="middle5", metadata=_help("`middle5`, `all`, or a list of layers."))
    head_quantile: float = field(default=0.3, metadata=_help("Share of the heads of these layers in each head group."))
    groups: str | os.PathLike[str] | HeadGroups | None = field(
        default=None,
        hash=False,
        metadata=_help("Head groups, or a file of them; else the first batch calibrates."),
    )
    regroup_steps: int = field(default=0, metadata=_help("Calibrate again every so many steps; 0: never."))
    sign: Sign = field(
        default="both", metadata=_help("Advantages that credit scales: `both`, `positive` or `negative`.")
    )

    def __post_init__(self) -> None:
        check_mode(self.mode)
        amounts = {name: float(check_number(name, getattr(self, name))) for name in ("gamma_amp", "top", "alpha")}
        check_amounts(**amounts)
        check_sign(self.sign)
        plain = {  # what a file, NumPy or a path gave, as it is written to files
            **amounts,
            "neighbors": check_int("neighbors", self.neighbors, 1),
            "window": check_window(self.window),
            "horizon": check_horizon(self.horizon),
            "layers": _check_layers(self.layers),
            "head_quantile": check_quantile("head_quantile", self.head_quantile),
            "groups": _check_groups(self.groups),
            "regroup_steps": check_int("regroup_steps", self.regroup_steps, 0),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def reads_attention(self) -> bool:
        """Whether this mode needs WAAD and FAI, hence head groups and a measured forward."""
        return self.mode in ("local", "global", "coupled")

    def load_groups(self) -> HeadGroups | None:
        """The head groups that `groups` names, if any.

        Raises:
            ValueError: a file that cannot be read, or is none of head groups.
        """
        if self.groups is None or isinstance(self.groups, HeadGroups):
            return self.groups
        try:
            return HeadGroups.load(self.groups)
        except OSError as error:
            said: Any = error.strerror
        except (ValueError, TypeError, RecursionError) as error:
            said = error
        raise ValueError(f"groups must be a file that HeadGroups.save wrote, got {self.groups!r}: {said}")

    def credit_options(self) -> dict[str, Any]:
        """The keyword arguments of `rhythm_credit`."""
        return {name: getattr(self, name) for name in ("mode", "gamma_amp", "top", "alpha", "neighbors")}


_MEANINGS = (f"{setting.name}: {setting.metadata['help']}" for setting in fields(RhythmSettings))
RhythmSettings.__doc__ = f"{RhythmSettings.__doc__}    " + "\n        ".join(["", *_MEANINGS]) + "\n    "


def check_mode(mode: object) -> None:
    """One of `CREDIT_MODES`."""
    if not isinstance(mode, str) or mode not in CREDIT_MODES:
        raise ValueError(f"mode must be one of {', '.join(CREDIT_MODES)}, got {mode!r}")


def check_amounts(gamma_amp: float, top: float, alpha: float) -> None:
    """The ranges of three numbers. A NaN is in none of them, and a tracer can compare it, unlike `math.isnan`."""
    if not 0 < gamma_amp < math.inf:
        raise ValueError(f"gamma_amp must be above 0 and finite, got {gamma_amp}")
    if not 0 < top <= 1:
        raise ValueError(f"top must be above 0 and at most 1, got {top}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")


def check_quantile(name: str, quantile: Any) -> float:
    """The share of the heads in a head group, in (0, 1]."""
    quantile = float(check_number(name, quantile))
    if not 0 < quantile <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {quantile}")
    return quantile


def check_sign(sign: object) -> None:
    """Which advantages gamma scales: one of `SIGNS`."""
    if not isinstance(sign, str) or sign not in SIGNS:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")


def _check_layers(layers: Any) -> str | tuple[int, ...]:
    """What could be layers; which layers there are, a model says."""
    if isinstance(layers, str) and layers in ("middle5", "all"):
        return layers
    try:
        if indices := tuple(as_int("layers", layer) for layer in layers):
            return indices
    except TypeError:
        pass
    raise ValueError(f"layers must be 'middle5', 'all' or a list of layer indices, got {layers!r}")


def _check_groups(groups: Any) -> str | HeadGroups | None:
    if groups is None or isinstance(groups, HeadGroups):
        return groups
    if isinstance(groups, str | os.PathLike):
        return str(os.fspath(groups))
    raise TypeError(f"groups must be HeadGroups or a file of them, got {type(groups).__name__}")

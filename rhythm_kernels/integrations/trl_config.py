"""The configuration of :mod:`rhythm_kernels.integrations.trl`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from ..arguments import check_horizon, check_window
from ..credit import check_sign, rhythm_credit

__all__ = ["RhythmGRPOConfig"]

# Losses of TRL in which a token's advantage multiplies that token's own log-probability, whatever the ratio's level.
_TOKENWISE_LOSSES = ("cispo", "vespo")


class _Distance(int):
    """How a command line's word for a distance is read: an integer, or `null` (as in YAML) for no end."""

    def __new__(cls, word: str) -> Any:
        return None if word == "null" else int(word)


@dataclass
class RhythmGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and the settings of the credit; see :func:`rhythm_kernels.rhythm_credit` for their meaning."""

    rhythm_mode: str = field(default="coupled", metadata={"help": "Credit rule; `uniform` is plain GRPO."})
    rhythm_gamma_amp: float = field(default=1.5, metadata={"help": "Factor of a chosen token's advantage."})
    rhythm_top: float = field(default=0.4, metadata={"help": "Share of the tokens of a response that are chosen."})
    rhythm_alpha: float = field(default=0.5, metadata={"help": "Share of a dominated token's bonus its intro gets."})
    rhythm_neighbors: int = field(default=3, metadata={"help": "Tokens before an anchor that may be its intro."})
    rhythm_window: int = field(default=10, metadata={"help": "W of WAAD, in tokens."})
    rhythm_horizon: list[_Distance] = field(
        default_factory=lambda: (10, 100),  # type: ignore[arg-type,return-value]  # command lines read no `default`
        metadata={"help": "First and last distance of FAI, in tokens; a last of `null` is the end of the response."},
    )
    rhythm_layers: str = field(default="middle5", metadata={"help": "`middle5`, `all`, or a list of layers."})
    rhythm_head_quantile: float = field(default=0.3, metadata={"help": "Share of the heads in each group."})
    rhythm_groups: str | None = field(
        default=None, metadata={"help": "File of head groups; without one, they are calibrated on the first batch."}
    )
    rhythm_regroup_steps: int = field(default=0, metadata={"help": "Calibrate again every so many steps; 0: never."})
    rhythm_sign: str = field(
        default="both", metadata={"help": "Advantages that the credit scales: `both`, `positive` or `negative`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_blind_credit()
        try:  # the checks of the functions that will get these numbers, before anything is loaded
            nothing = torch.zeros(1, 1)
            rhythm_credit(nothing, nothing, nothing, entropy=nothing, **self.credit_options())
        except (TypeError, ValueError) as error:
            raise type(error)(f"rhythm_{error}") from error
        if not 0 < self.rhythm_head_quantile <= 1:
            raise ValueError(f"rhythm_head_quantile is {self.rhythm_head_quantile}: it must be above 0 and at most 1")
        check_window(self.rhythm_window, "rhythm_window")
        check_horizon(self.rhythm_horizon, "rhythm_horizon")
        check_sign(self.rhythm_sign, "rhythm_sign")
        if self.rhythm_groups is not None and not os.path.exists(self.rhythm_groups):
            raise ValueError(f"rhythm_groups is {self.rhythm_groups!r}: there is no such file")
        if self.rhythm_regroup_steps < 0:
            raise ValueError(f"rhythm_regroup_steps is {self.rhythm_regroup_steps}: it must be at least 0")

    def refuse_blind_credit(self) -> None:
        """Raise where the loss would not see which tokens the credit chose.

        With one ratio for a whole response, its gradient is that of the ratio times the sum of the advantages. Losses
        that multiply each token's own log-probability keep the tokens apart at either level.
        """
        level, loss = self.importance_sampling_level, self.loss_type
        if self.rhythm_mode == "uniform" or level == "token" or loss in _TOKENWISE_LOSSES:
            return
        raise ValueError(
            f"importance_sampling_level is {level!r}: it must be 'token' for rhythm_mode={self.rhythm_mode!r} with "
            f"loss_type={loss!r}. There all tokens of a response share one ratio, and credit would vanish into its "
            "mean over the response: which tokens it chose would change nothing. Or set loss_type to one of "
            f"{', '.join(map(repr, _TOKENWISE_LOSSES))}, or rhythm_mode to 'uniform'"
        )

    def credit_options(self) -> dict[str, Any]:
        """The keyword arguments of `rhythm_credit`."""
        return {n: getattr(self, f"rhythm_{n}") for n in ("mode", "gamma_amp", "top", "alpha", "neighbors")}

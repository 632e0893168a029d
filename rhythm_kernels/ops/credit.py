"""`credit`: the factor gamma of each token (eqs. 14 to 19), for a batch of responses of different lengths."""

from typing import Any

import torch
from torch import Tensor

from ..rule import Choice
from .library import define


def gamma_levels(gamma_amp: float, alpha: float) -> list[float]:
    """Eq. 19: the float32 value of gamma for each kind of token.

    Index 0: not chosen. 1: in `T_glob` and not dominated (in the other modes: chosen). 2: in `T_glob` and dominated.
    3 to 5: the same three, where the token is also an intro token.
    """
    levels = []
    for intro in (False, True):
        for anchor, dominated in ((False, False), (True, False), (False, True)):
            bonus = float(anchor) + (1 - alpha) * dominated + alpha * intro
            levels.append(1 + (gamma_amp - 1) * bonus)
    return torch.tensor(levels, dtype=torch.float32, device="cpu").tolist()


def _fold(
    waad: Tensor, fai: Tensor, score: Tensor | None, mask: Tensor, mode: str, gamma_amp: float, top: float,
    alpha: float, neighbors: int, bottom: bool, tau_waad: float | None, tau_delta: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Choice]:  # fmt: skip
    levels = gamma_levels(gamma_amp, alpha)
    return waad, fai, score, mask, Choice(mode, top, neighbors, bottom, tau_waad, tau_delta, levels)


def _fake(*args: Any) -> Tensor:
    mask = args[3]
    return mask.new_empty(mask.shape, dtype=torch.float32)


# waad, fai, score (B, T): one dtype, float32 or float64, contiguous; mask (B, T) bool, contiguous. `score` is what the
# modes entropy and random choose by, and None for the others: local, global and coupled.
credit = define(
    "credit",
    "Tensor waad, Tensor fai, Tensor? score, Tensor mask, str mode, float gamma_amp, float top, float alpha, "
    "SymInt neighbors, bool bottom, float? tau_waad, float? tau_delta",
    "Tensor",
    _fake,
    _fold,
)

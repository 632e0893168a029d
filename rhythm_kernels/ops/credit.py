"""`credit`: the factor gamma of each token (eqs. 14 to 19), a batch of jagged responses at a time."""

import torch
from torch import Tensor

from .library import define


def _fake(
    waad: Tensor,
    fai: Tensor,
    score: Tensor | None,
    mask: Tensor,
    mode: str,
    gamma_amp: float,
    top: float,
    alpha: float,
    neighbors: int,
    bottom: bool,
    tau_waad: float | None,
    tau_delta: float | None,
    backend: str | None,
) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.float32)


# waad, fai, score (B, T): one dtype, float32 or float64, contiguous; mask (B, T) bool, contiguous. `score` is what the
# modes entropy and random choose by, and None for the others: local, global and coupled.
credit = define(
    "credit",
    "Tensor waad, Tensor fai, Tensor? score, Tensor mask, str mode, float gamma_amp, float top, float alpha, "
    "SymInt neighbors, bool bottom, float? tau_waad, float? tau_delta",
    "Tensor",
    _fake,
)

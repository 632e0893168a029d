"""The credit op in plain torch: any device, no loop over tokens, no value read back to the host.

What every backend's `credit` does; the definition, as Python loops, is :func:`rhythm_kernels.reference.rhythm_credit`,
and all of them give the same bits: measures are compared as they are (0.0 and -0.0 are equal), given thresholds in the
measures' precision, the size of a set is counted in double, and the six values that gamma can take are computed once,
in double (`Choice.levels`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...rule import Choice

__all__ = ["credit"]


def credit(waad: Tensor, fai: Tensor, score: Tensor | None, mask: Tensor, choice: Choice) -> Tensor:
    """`gamma (B, T)` float32 of checked measures; the op of that name says what the arguments are."""
    mode, top, neighbors, bottom, tau_waad, tau_delta, levels = choice
    response = _Response.of(mask)
    measures = [waad, fai] if score is None else [waad, fai, score]
    finite = torch.stack([(x.isfinite() | ~mask).all(dim=1) for x in measures]).all(dim=0)
    live = response.live & finite[:, None]
    size = torch.ceil(top * response.length.double() - 1e-9)  # (B, 1)

    def compact(x: Tensor) -> Tensor:
        return torch.where(live, x.gather(1, response.order), 0)

    dominated = intro = torch.zeros_like(live)
    if mode == "local":
        chosen = _extreme(_delta(compact(waad), live), live, size, lowest=bottom)
    elif mode in ("global", "coupled"):
        influence = compact(fai)
        chosen = _extreme(influence, live & (influence > 0), size, lowest=bottom)
        if mode == "coupled":
            dominated, intro = _coupled(compact(waad), chosen, live, size, neighbors, tau_waad, tau_delta)
    else:
        assert score is not None
        chosen = _extreme(compact(score), live, size, lowest=bottom)

    gamma = torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
    _, anchor_level, dominated_level, *intro_levels = levels
    gamma.masked_fill_(chosen, anchor_level).masked_fill_(dominated, dominated_level)
    if mode == "coupled":
        for role, level in zip((~chosen, chosen & ~dominated, dominated), intro_levels, strict=True):
            gamma.masked_fill_(role & intro, level)
    return torch.where(mask, gamma.gather(1, response.place), 1.0)


class _Response(NamedTuple):
    """The masked tokens of each batch row moved to its front, and the way back."""

    order: Tensor  #  (B, T) int64: which token stands at each place; masked tokens first, in order
    place: Tensor  #  (B, T) int64: the place of each token
    live: Tensor  #   (B, T) bool: places that hold a masked token
    length: Tensor  # (B, 1) int64: n

    @classmethod
    def of(cls, mask: Tensor) -> _Response:
        order = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
        length = mask.sum(dim=1, keepdim=True)
        live = torch.arange(mask.shape[1], device=mask.device) < length
        return cls(order, order.argsort(dim=1), live, length)


def _extreme(x: Tensor, among: Tensor, size: Tensor, *, lowest: bool) -> Tensor:
    """`TopQ` (or its mirror): the `size (B, 1)` highest of `x (B, T)` where `among`, ties to the earlier token."""
    last = math.inf if lowest else -math.inf
    order = torch.where(among, x, last).sort(dim=1, descending=not lowest, stable=True).indices
    return (order.argsort(dim=1) < size) & among


def _delta(waad: Tensor, live: Tensor) -> Tensor:
    """Eq. 14: how far WAAD moves from each token to the next one; 0 at the last."""
    step = (waad[:, :-1] - waad[:, 1:]).abs()
    delta = torch.zeros_like(waad)
    delta[:, :-1] = torch.where(live[:, 1:], step, 0)
    return delta


def _coupled(
    waad: Tensor,
    anchors: Tensor,
    live: Tensor,
    size: Tensor,
    neighbors: int,
    tau_waad: float | None,
    tau_delta: float | None,
) -> tuple[Tensor, Tensor]:
    """Eq. 18 on tokens in compact order: which are dominated, and which are intro tokens of those, `(B, T)` bool."""
    delta = _delta(waad, live)
    low: Tensor | float
    high: Tensor | float
    if tau_waad is None:
        middle = ((live.sum(dim=1, keepdim=True) - 1) // 2).clamp(min=0)
        low = torch.where(live, waad, math.inf).sort(dim=1).values.gather(1, middle)
    else:
        low = _rounded(tau_waad, waad.dtype)
    if tau_delta is None:
        local = _extreme(delta, live, size, lowest=False)
        high = torch.where(local, delta, math.inf).amin(dim=1, keepdim=True)
    else:
        high = _rounded(tau_delta, waad.dtype)

    # The largest delta among the k tokens before each, from the nearest to the farthest: of equal ones the later stays.
    steps = range(1, min(neighbors, waad.shape[1] - 1) + 1)
    peak = torch.full_like(delta, -math.inf)  # (B, T), that delta
    back = torch.zeros_like(delta, dtype=torch.int64)  # (B, T), how many tokens before
    for step in steps:
        before = delta[:, :-step]
        nearer = peak[:, step:]
        back[:, step:] = torch.where(before > nearer, step, back[:, step:])
        peak[:, step:] = torch.maximum(before, nearer)
    dominated = anchors & (waad <= low) & (peak >= high) & (back > 0)

    intro = torch.zeros_like(dominated)
    for step in steps:
        intro[:, :-step] |= (dominated & (back == step))[:, step:]
    return dominated, intro


def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """A threshold as a measure of that precision would hold it."""
    return float(torch.tensor(threshold, dtype=dtype, device="cpu"))

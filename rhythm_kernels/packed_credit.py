"""Credit of packed batch rows, in which several sequences stand one behind the other: each is a response of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import check_tensor, readable

__all__ = ["bounds_of", "sequence_by_sequence"]


def bounds_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, int]:
    """`(S, 2)` int64, where each sequence begins and ends in the flattened batch, and a length that none exceeds."""
    if check_tensor("cu_seqlens", cu_seqlens).dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be (S + 1,), got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.is_floating_point():
        raise TypeError(f"cu_seqlens must hold integers, got {cu_seqlens.dtype}")
    offsets = cu_seqlens.long().clamp(0, total)
    longest = int(offsets.diff().max()) if readable(offsets) else total
    return torch.stack([offsets[:-1], offsets[1:]], dim=1), max(longest, 1)


def sequence_by_sequence(
    credit: Callable[..., Tensor],
    waad: Tensor,
    fai: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    bounds: Tensor,
    longest: int,
) -> Tensor:
    """Gamma `(B, T)` where `bounds[i]` of the flattened batch is a response.

    Args:
        credit: `rhythm_credit` with its options.
        waad, fai, mask, entropy: `(B, T)`; mask is bool.
        bounds, longest: as :func:`bounds_of` gives them.
    """
    bounds, total = bounds.to(waad.device), mask.numel()
    place = bounds[:, :1] + torch.arange(longest, device=waad.device)  # (S, longest), into the flattened batch
    inside = place < bounds[:, 1:]  # (S, longest)
    place = place.where(inside, 0)
    of_each = (waad.flatten()[place], fai.flatten()[place], mask.flatten()[place] & inside)
    gamma = credit(*of_each, entropy=None if entropy is None else entropy.flatten()[place])
    spread = torch.ones(total + 1, device=waad.device)  # the last place takes what lies outside of its sequence
    return spread.scatter(0, place.where(inside, total).flatten(), gamma.flatten())[:total].view(mask.shape)

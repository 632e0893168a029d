"""ms-swift's two layouts of a micro-batch under `--padding_free`: a packed row for the model, `(B, T)` for the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import layouts
from ...probe.split_batch import over_tokens

__all__ = ["pack", "unpack"]

# The loss sees the last T places of the packed row, as far back as the first response begins. Each sequence's share of
# them stands at the right end of a batch row of its own.


def pack(values: Tensor, seq_lengths: Tensor, total: int) -> Tensor:
    """`(1, total)` of the packed row from `(B, T)` of the loss, zero before it.

    Args:
        values: `(B, T)`.
        seq_lengths: `(B,)`, the share of each sequence in the last T places.
        total: the tokens of the packed row.
    """
    return over_tokens(layouts.pack(values, _shares(values, seq_lengths))[None], total)


def unpack(values: Tensor, seq_lengths: Tensor, like: Tensor) -> Tensor:
    """`(B, T)` of the loss, as `like` is, from `(1, total)` of the packed row; 1 where no sequence has a share."""
    return layouts.unpack(values[:, values.shape[1] - like.shape[1] :], _shares(like, seq_lengths), fill=1)


def _shares(like: Tensor, seq_lengths: Tensor) -> Tensor:
    """`(B, T)` bool: the places that belong to a sequence."""
    width = like.shape[1]
    return torch.arange(width, device=like.device) >= width - seq_lengths.to(like.device)[:, None]

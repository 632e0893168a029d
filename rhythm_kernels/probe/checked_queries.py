"""The few queries at which a mask is compared with the ranges of keys that it is taken for.

A `(T, T)` mask is never read whole. What the first, the middle and the last token of a few sequences see shows whether
packing, padding, chunks and a sliding window took effect in it: O(T) work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SEQUENCES = 16


class CheckedQueries(NamedTuple):
    """`(n,)` each: where a query is, and where its sequence starts.

    Attributes:
        batch_row, start, token: int64; `start` and `token` count within the batch row.
        exists: bool, False for the queries of empty sequences, at which nothing is compared.
    """

    batch_row: Tensor
    start: Tensor
    token: Tensor
    exists: Tensor


def queries_to_check(bounds: Tensor, length: int) -> CheckedQueries:
    """Those of the first few sequences.

    Args:
        bounds: `(S, 3)` int: batch row, start and end of each sequence.
        length: tokens of a batch row.
    """
    batch_row, start, end = bounds[:_SEQUENCES].long().unbind(1)
    last = (end - 1).clamp(min=0)
    token = torch.stack([start.clamp(max=length - 1), (start + last) // 2, last])
    batch_row, start, exists = (x.expand(3, -1).flatten() for x in (batch_row, start, end > start))
    return CheckedQueries(batch_row, start, token.flatten(), exists)


def see_ranges(visible: Tensor, queries: CheckedQueries, left: int | Tensor) -> Tensor:
    """Whether each query sees the keys from its sequence's start to itself, of these the last `left + 1`; 0-d bool.

    Args:
        visible: `(n, T)` bool, the keys that the queries see.
        left: -1 where there is no window; an int or a 0-d tensor.
    """
    key = torch.arange(visible.shape[1], device=visible.device)
    token = queries.token[:, None]
    expected = (key >= queries.start[:, None]) & (key <= token)
    if isinstance(left, Tensor):
        expected &= (left < 0) | (token - key <= left)
    elif left >= 0:
        expected &= token - key <= left
    return ((visible == expected) | ~queries.exists[:, None]).all()

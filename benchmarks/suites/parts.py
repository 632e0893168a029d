"""`window`: a column pass behind a sliding window beside the row pass behind it (`contenders/parts.py`)."""

from __future__ import annotations

from ..shapes import PartShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def window_work(shape: PartShape) -> Work:
    """The row pass behind the window: pairs that see each other alone."""
    return Work(
        q_bytes(shape) + k_bytes(shape) + lse_bytes(shape) + 2 * token_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, shape.left)),
    )

"""`band_columns`: FAI (eq. 10) given the log-sum-exp; each key meets the rows lo to hi after it."""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def work(shape: AttentionShape) -> Work:
    """Distances lo to hi; q, k and lse in, one value a token out."""
    return Work(
        q_bytes(shape) + k_bytes(shape) + lse_bytes(shape) + token_bytes(shape),
        dot_flops(shape, pairs(shape.length, shape.lo, shape.hi)),
    )

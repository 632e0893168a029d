"""`band_rows`: WAAD (eq. 9) given the log-sum-exp; each row meets its last W keys."""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def work(shape: AttentionShape) -> Work:
    """Distances 0 to W - 1; q, k and lse in, one value a token out."""
    return Work(
        q_bytes(shape) + k_bytes(shape) + lse_bytes(shape) + token_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, shape.window - 1)),
    )

"""`row_stats`: log-sum-exp, WAAD and span (eqs. 9, 7) of every row over all its keys, from q and k alone."""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def work(shape: AttentionShape) -> Work:
    """All causal pairs, once; q and k in; lse of each head, WAAD and span of each token out."""
    return Work(
        q_bytes(shape) + k_bytes(shape) + lse_bytes(shape) + 2 * token_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, None)),
    )

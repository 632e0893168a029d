"""`attention`: a causal attention forward; log-sum-exp, WAAD and span beside the output where a rival gives them."""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def work(shape: AttentionShape) -> Work:
    """All causal pairs, a product with k and one with v; q, k, v in; out, lse, WAAD and span out."""
    return Work(
        2 * q_bytes(shape) + 2 * k_bytes(shape) + lse_bytes(shape) + 2 * token_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, None), products=2),
    )


def forward_work(shape: AttentionShape) -> Work:
    """The forward alone: what a plain attention call must do."""
    return Work(2 * q_bytes(shape) + 2 * k_bytes(shape), dot_flops(shape, pairs(shape.length, 0, None), products=2))

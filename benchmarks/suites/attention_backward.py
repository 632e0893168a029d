"""`attention_backward`: dq, dk and dv of causal attention from the gradient of its output."""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes


def work(shape: AttentionShape) -> Work:
    """All causal pairs, five products: x again, dV, dP, dQ, dK; q, k, v, out, its gradient and lse in, three out."""
    return Work(
        4 * q_bytes(shape) + 4 * k_bytes(shape) + lse_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, None), products=5),
    )

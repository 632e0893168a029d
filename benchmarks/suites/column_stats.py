"""`column_stats`: the attention each key receives from all later rows, given the log-sum-exp.

Measured from distance 0, where the mean is the causal column mean that flash-colreduce computes; FAI to the end of the
response is the same pass from distance `lo`.
"""

from __future__ import annotations

from ..shapes import AttentionShape
from ..work import Work, dot_flops, k_bytes, lse_bytes, pairs, q_bytes, token_bytes


def work(shape: AttentionShape) -> Work:
    """The mean: all causal pairs, once; q, k and lse in, one value a token out."""
    return Work(
        q_bytes(shape) + k_bytes(shape) + lse_bytes(shape) + token_bytes(shape),
        dot_flops(shape, pairs(shape.length, 0, None)),
    )


def moments_work(shape: AttentionShape) -> Work:
    """Count, mean, variance, skewness and kurtosis: the same pairs, five values a token out."""
    mean = work(shape)
    return Work(mean.bytes + 4 * token_bytes(shape), mean.flops)

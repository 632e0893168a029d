"""What a pass must do, counted: bytes each read or written once, and multiply-adds as two operations each.

The exponentials are not counted: one a pair of tokens, beside `2 D` operations of its dot product.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import AttentionShape


@dataclass(frozen=True)
class Work:
    """Compulsory memory traffic in bytes, and floating-point operations."""

    bytes: int
    flops: int


def pairs(length: int, lo: int, hi: int | None) -> int:
    """How many pairs `(t, s)` of a causal sequence lie at a distance `lo <= t - s <= hi` (None: any)."""
    last = length - 1 if hi is None else min(hi, length - 1)
    if last < lo:
        return 0
    # At distance d there are `length - d` pairs.
    return (last - lo + 1) * length - (lo + last) * (last - lo + 1) // 2


def q_bytes(shape: AttentionShape) -> int:
    """q, and as much again for an attention output of the same head size."""
    return shape.batch * shape.length * shape.heads * shape.dim * shape.itemsize


def k_bytes(shape: AttentionShape) -> int:
    """k (or v)."""
    return shape.batch * shape.length * shape.kv_heads * shape.dim * shape.itemsize


def lse_bytes(shape: AttentionShape) -> int:
    """The log-sum-exp, float32."""
    return shape.batch * shape.length * shape.heads * 4


def token_bytes(shape: AttentionShape) -> int:
    """One float32 result a token."""
    return shape.batch * shape.length * 4


def dot_flops(shape: AttentionShape, n_pairs: int, products: int = 1) -> int:
    """`products` products of `D` for each pair, query head and batch row."""
    return 2 * shape.dim * products * n_pairs * shape.heads * shape.batch

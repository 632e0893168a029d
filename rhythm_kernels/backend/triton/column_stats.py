"""Full-horizon FAI: the mean attention every token receives from all later rows of the response, O(T^2 D).

A program keeps a tile of keys and streams the later rows past it. ``FAI[s]`` is the mean of ``A[t, s]`` over the rows
``t in [s + min_distance, end)``; rows count by position, so those that a sliding window keeps from seeing s count with
``A = 0``.

Rows stand along the first axis of a product, keys along the second, and the sum over rows stays a tile `(ROWS, KEYS)`
until the end: a lane of a tensor-core result holds many keys of two rows. So it reads two numbers of lse a tile, sums
with one addition a pair, and talks to no other lane inside of the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .column_moments import column_moments_kernel
from .launch import UNSPECIALIZED, Problem, over_heads
from .score import in_bits, known, nothing, rule_of_head, visible, weight_in_bits
from .tokens import at_head, load_lse, load_tokens, locate, products


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_stats_kernel(
    q, k, lse, seqs, heads, out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, min_distance: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, _, end, response, tile, listed = locate(seqs, tiles, n_heads, False)
    first = response + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)
    # Rows after s are rows of the response, because s is in it.
    rows_from = first + min_distance
    rows_to = end
    whole_to = end
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
        whole_to = tl.minimum(end, first + window_left + 1)
    # Tiles of rows that are far enough from every key of the tile, and seen by them: no mask. The others are edges.
    n_before = (KEYS - 1 + ROWS - 1) // ROWS
    whole_from = rows_from + n_before * ROWS
    n_whole = tl.maximum(whole_to - whole_from, 0) // ROWS
    n_edges = tl.cdiv(tl.maximum(rows_to - rows_from, 0), ROWS) - n_whole

    head, q, k, lse_head = at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN)
    own = rule_of_head(rule, sequence, head)
    lse += row * lse_b + lse_head * lse_h
    k_low, k_high = load_tokens(k, first, end, k_t * ALIGN, KEYS, D, D0, D1, UPCAST)
    received = tl.zeros([ROWS, KEYS], tl.float32)
    zero = nothing(own, rule)
    for edge in range(n_edges):
        t0 = rows_from + (edge + tl.where(edge < n_before, 0, n_whole)) * ROWS
        lse_bits = in_bits(known(load_lse(lse, t0, rows_to, lse_t, ROWS), zero), rule)
        q_low, q_high = load_tokens(q, t0, rows_to, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)
        product = products(q_low, q_high, k_low, k_high, D1)
        t = t0 + tl.arange(0, ROWS)
        distance = t[:, None] - s[None, :]
        a = weight_in_bits(product, lse_bits[:, None], distance, own, rule)
        counted = (t < rows_to)[:, None] & (distance >= min_distance)
        received += tl.where(counted & visible(distance, window_left), a, 0.0)
    # The log-sum-exp of a tile is asked for a tile ahead: it comes from far, and nothing else would wait for it.
    whole_to = whole_from + n_whole * ROWS
    next_lse = load_lse(lse, whole_from, whole_to, lse_t, ROWS)
    for t0 in range(whole_from, whole_to, ROWS):
        lse_bits = in_bits(known(next_lse, zero), rule)
        next_lse = load_lse(lse, t0 + ROWS, whole_to, lse_t, ROWS)
        q_low, q_high = load_tokens(q, t0, whole_to, q_t * ALIGN, ROWS, D, D0, D1, UPCAST, False)
        product = products(q_low, q_high, k_low, k_high, D1)
        t = t0 + tl.arange(0, ROWS)
        received += weight_in_bits(product, lse_bits[:, None], t[:, None] - s[None, :], own, rule)

    count = tl.maximum(end - (s + min_distance), 0).to(tl.float32)
    mean = tl.where(count > 0, tl.sum(received, 0) / tl.maximum(count, 1.0), 0.0)
    tl.store(out + row * out_b + tl.cast(listed, tl.int64) * out_h + s, mean, mask=s < end)


def column_stats(
    q: Tensor, k: Tensor, lse: Tensor, rule: Rule, min_distance: int, moments: bool, per_head: bool,
) -> Tensor:  # fmt: skip
    """Mean, or central moments, of the attention every response token receives from later rows, given `lse`.

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`; float32, bfloat16 or float16, last dimension contiguous.
        lse: `(B, X, T)` float32, natural log.
        min_distance: rows nearer than this many tokens do not count.
        moments: count, mean, population variance, skewness and kurtosis (`m4 / m2^2`) instead of the mean alone.

    Returns:
        float32 `(1, B, T)`, or `(5, B, T)` with `moments`, the mean over the heads of the heads' own values; with
        `per_head` `(1 or 5, B, Hs, T)`. 0 outside the responses and where no row counts; skewness and kurtosis are 0
        where fewer than two rows count or their variance is 0.
    """
    name = "column_moments" if moments else "column_stats"
    problem = Problem(name, q, k, lse, rule, owner="keys")
    out = problem.output(5 if moments else 1)
    if moments:
        problem.launch(column_moments_kernel, out, out=out, out_m=out.stride(0), min_distance=min_distance)
    else:
        problem.launch(column_stats_kernel, out, out=out, min_distance=min_distance)
    return over_heads(out, per_head)

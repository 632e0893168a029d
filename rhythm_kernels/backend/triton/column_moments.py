"""The central moments of the attention a token receives from all later rows: one pass over the columns, O(T^2 D).

A program keeps a tile of keys and streams the later rows past it. Over the rows ``t in [s + min_distance, end)`` of
``A[t, s]`` it merges count, mean and central moments tile by tile with Chan's formulas: raw power sums in float32 give
kurtoses below zero. Rows count by position, so those that a sliding window keeps from seeing s count with ``A = 0``;
they are merged at once, as one tile of zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import UNSPECIALIZED
from .score import known, logit, nothing, rule_of_head, visible, weight
from .tokens import at_head, load_lse, load_tokens, locate, products

# Moments are those of 2^20 A: the fourth power of A = 1e-10 would leave float32.
UNITS = tl.constexpr(2.0**20)


@triton.jit
def received(
    k_low, k_high, q_head, q_stride, row_lse, s, t0, rows_to, min_distance, own, rule, window_left,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    SOME_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """`A` of a tile of rows `t0 ..`, as `(keys, rows)`, and which rows count for which key.

    `row_lse`: that of these rows, large from `rows_to` on: rows past it alone need no mask. `SOME_OUTSIDE`: some row
    may be too near to a key, past `rows_to`, or not see it.
    """
    t = t0 + tl.arange(0, ROWS)
    q_low, q_high = load_tokens(q_head, t0, rows_to, q_stride, ROWS, D, D0, D1, UPCAST)
    distance = t[None, :] - s[:, None]
    x = logit(products(k_low, k_high, q_low, q_high, D1), distance, own, rule, 1.0)
    a = weight(x, row_lse[None, :], 1.0)
    counted = (t < rows_to)[None, :]
    if SOME_OUTSIDE:
        counted = counted & (distance >= min_distance)
        a = tl.where(counted & visible(distance, window_left), a, 0.0)
    return a, counted


@triton.jit
def merge(n, mean, m2, m3, m4, n_b, mean_b, m2_b, m3_b, m4_b):
    """Count, mean and sums of central powers of two sets of values, joined (Chan; Pebay)."""
    total = n + n_b
    some = tl.maximum(total, 1.0)
    f, f_b = n / some, n_b / some
    delta = mean_b - mean
    square = delta * delta
    return (
        total,
        mean + delta * f_b,
        m2 + m2_b + square * n * f_b,
        m3 + m3_b + square * delta * n * f_b * (f - f_b) + 3.0 * delta * (f * m2_b - f_b * m2),
        m4 + m4_b + square * square * n * f_b * (f * f - f * f_b + f_b * f_b)
        + 6.0 * square * (f * f * m2_b + f_b * f_b * m2) + 4.0 * delta * (f * m3_b - f_b * m3),
    )  # fmt: skip


@triton.jit
def merge_tile(n, mean, m2, m3, m4, a, counted, n_rows):
    """A tile `(keys, rows)` of A, of which `n_rows` of each key count, joined to count, mean and sums of powers."""
    a *= UNITS
    n_b = tl.maximum(n_rows, 0).to(tl.float32)
    mean_b = tl.sum(a, 1) / tl.maximum(n_b, 1.0)
    c = tl.where(counted, a - mean_b[:, None], 0.0)
    c2 = c * c
    return merge(n, mean, m2, m3, m4, n_b, mean_b, tl.sum(c2, 1), tl.sum(c2 * c, 1), tl.sum(c2 * c2, 1))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_moments_kernel(
    q, k, lse, seqs, heads, out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, min_distance: tl.int32, out_m: tl.int64,
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
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
    # From here on every row is far enough from every key.
    inner = rows_from + tl.cdiv(KEYS - 1, ROWS) * ROWS

    head, q, k, lse_head = at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN)
    own = rule_of_head(rule, sequence, head)
    lse += row * lse_b + lse_head * lse_h
    zero = tl.zeros([KEYS], tl.float32)
    factor = nothing(own, rule)
    k_low, k_high = load_tokens(k, first, end, k_t * ALIGN, KEYS, D, D0, D1, UPCAST)
    n, mean, m2, m3, m4 = zero, zero, zero, zero, zero
    for t0 in range(rows_from, tl.minimum(inner, rows_to), ROWS):
        row_lse = known(load_lse(lse, t0, rows_to, lse_t, ROWS), factor)
        a, counted = received(
            k_low, k_high, q, q_t * ALIGN, row_lse, s, t0, rows_to, min_distance,
            own, rule, window_left, D, D0, D1, UPCAST, ROWS, True,
        )  # fmt: skip
        n_rows = tl.minimum(t0 + ROWS, rows_to) - tl.maximum(t0, s + min_distance)
        n, mean, m2, m3, m4 = merge_tile(n, mean, m2, m3, m4, a, counted, n_rows)
    # The log-sum-exp of a tile is asked for a tile ahead: nothing else would wait for it.
    next_lse = load_lse(lse, inner, rows_to, lse_t, ROWS)
    for t0 in range(inner, rows_to, ROWS):
        row_lse = known(next_lse, factor)
        next_lse = load_lse(lse, t0 + ROWS, rows_to, lse_t, ROWS)
        a, counted = received(
            k_low, k_high, q, q_t * ALIGN, row_lse, s, t0, rows_to, min_distance,
            own, rule, window_left, D, D0, D1, UPCAST, ROWS, window_left is not None,
        )  # fmt: skip
        n_rows = zero.to(tl.int32) + (tl.minimum(t0 + ROWS, rows_to) - t0)
        n, mean, m2, m3, m4 = merge_tile(n, mean, m2, m3, m4, a, counted, n_rows)
    hidden = tl.maximum(end - tl.maximum(rows_to, s + min_distance), 0).to(tl.float32)
    n_seen, mean_seen = n, mean
    n, mean, m2, m3, m4 = merge(n, mean, m2, m3, m4, hidden, zero, zero, zero, zero)
    # What is left of the mean is its share of the rows: the mean less nearly all of it would cancel.
    mean = mean_seen * (n_seen / tl.maximum(n, 1.0))
    m2, m3, m4 = m2 / tl.maximum(n, 1.0), m3 / tl.maximum(n, 1.0), m4 / tl.maximum(n, 1.0)
    # NaN is not 0: it goes on into all three.
    flat = (m2 == 0.0) | (n < 2.0)
    safe = tl.where(flat, 1.0, m2)

    live = s < end
    some = end - (s + min_distance) > 0
    out += row * out_b + tl.cast(listed, tl.int64) * out_h + s
    tl.store(out, n, mask=live)
    tl.store(out + out_m, tl.where(some, mean / UNITS, 0.0), mask=live)
    tl.store(out + 2 * out_m, tl.where(n < 2.0, 0.0, m2 / (UNITS * UNITS)), mask=live)
    tl.store(out + 3 * out_m, tl.where(flat, 0.0, m3 / safe / tl.sqrt(safe)), mask=live)
    tl.store(out + 4 * out_m, tl.where(flat, 0.0, m4 / safe / safe), mask=live)

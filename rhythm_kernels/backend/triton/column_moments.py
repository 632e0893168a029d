"""The central moments of the attention a token receives from all later rows: one pass over the columns, O(T^2 D).

A program keeps a tile of keys and streams the later rows. Over the rows ``t in [s + min_distance, end)`` of ``A[t, s]``
it merges count, mean and central moments tile by tile with Chan's formulas: raw power sums in float32 cancel, and gave
kurtoses below zero. Rows count by position: a row that does not see s because of a sliding window counts with
``A = 0``. All those rows are merged at the end, as one tile of zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import UNSPECIALIZED
from .score import known, logit, nothing, rule_of_head, visible, weight
from .tokens import listed_head, load_lse, load_tokens, locate, products

# Moments are taken of 2^24 A on every backend: the fourth power of a deviation of 1e-10 would leave float32's range. A
# power of two changes no bit inside that range.
UNITS = tl.constexpr(2.0**24)


@triton.jit
def received(
    k_low, k_high, q, q_token, row_lse, s, t0, rows_to, min_distance, head_rule, rule, window_left,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    SOME_OUTSIDE: tl.constexpr,
):  # fmt: skip
    """`A` of the keys s and a tile of rows from `t0` on, `[KEYS, ROWS]`, and which rows count for which key.

    `row_lse [ROWS]` is that of :func:`load_lse`, which makes A 0 from `rows_to` on without a mask. `SOME_OUTSIDE`: some
    row may be nearer to a key than `min_distance`, or not see it.
    """
    t = t0 + tl.arange(0, ROWS)  # [ROWS]
    q_low, q_high = load_tokens(q, t0, rows_to, q_token, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
    distance = t[None, :] - s[:, None]  # [KEYS, ROWS]
    x = logit(products(k_low, k_high, q_low, q_high, D1), distance, head_rule, rule, 1.0)  # [KEYS, ROWS]
    a = weight(x, row_lse[None, :], 1.0)  # [KEYS, ROWS]
    counted = (t < rows_to)[None, :]  # [1, ROWS]
    if SOME_OUTSIDE:
        counted = counted & (distance >= min_distance)  # [KEYS, ROWS]
        a = tl.where(counted & visible(distance, window_left), a, 0.0)
    return a, counted


@triton.jit
def merge(n, mean, m2, m3, m4, n_b, mean_b, m2_b, m3_b, m4_b):
    """Count, mean and sums of central powers of the union of two sets, each number `[KEYS]` (Chan; Pebay)."""
    total = n + n_b  # [KEYS], as all below
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
    """Merge a tile `a [KEYS, ROWS]`, of which `n_rows [KEYS]` rows count, into count, mean and sums of powers."""
    a *= UNITS
    n_b = tl.maximum(n_rows, 0).to(tl.float32)  # [KEYS]
    mean_b = tl.sum(a, 1) / tl.maximum(n_b, 1.0)  # [KEYS]
    c = tl.where(counted, a - mean_b[:, None], 0.0)  # [KEYS, ROWS]
    c2 = c * c  # [KEYS, ROWS]
    return merge(n, mean, m2, m3, m4, n_b, mean_b, tl.sum(c2, 1), tl.sum(c2 * c, 1), tl.sum(c2 * c2, 1))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_moments_kernel(
    q, k, lse, seqs, heads, out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, lse_token: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, min_distance: tl.int32, out_moment: tl.int64,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, _, end, response, tile, entry = locate(seqs, tiles, n_selected, False)
    first = response + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)  # [KEYS]
    # s lies in the response, which ends with the sequence, so every later row does.
    rows_from = first + min_distance
    rows_to = end
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
    # From here on every row is far enough from every key.
    inner = rows_from + tl.cdiv(KEYS - 1, ROWS) * ROWS

    head, q, k, lse_index = listed_head(
        q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN
    )  # fmt: skip
    head_rule = rule_of_head(rule, sequence, head)
    lse += batch_row * lse_batch + lse_index * lse_head
    zero = tl.zeros([KEYS], tl.float32)
    factor = nothing(head_rule, rule)
    k_low, k_high = load_tokens(k, first, end, k_token * ALIGN, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
    n, mean, m2, m3, m4 = zero, zero, zero, zero, zero
    for t0 in range(rows_from, tl.minimum(inner, rows_to), ROWS):
        row_lse = known(load_lse(lse, t0, rows_to, lse_token, ROWS), factor)  # [ROWS]
        a, counted = received(
            k_low, k_high, q, q_token * ALIGN, row_lse, s, t0, rows_to, min_distance,
            head_rule, rule, window_left, D, D0, D1, UPCAST, ROWS, True,
        )  # [KEYS, ROWS] both  # fmt: skip
        n_rows = tl.minimum(t0 + ROWS, rows_to) - tl.maximum(t0, s + min_distance)  # [KEYS]
        n, mean, m2, m3, m4 = merge_tile(n, mean, m2, m3, m4, a, counted, n_rows)
    # lse is loaded a tile ahead, so that the latency of the load is hidden behind a tile's work.
    next_lse = load_lse(lse, inner, rows_to, lse_token, ROWS)  # [ROWS]
    for t0 in range(inner, rows_to, ROWS):
        row_lse = known(next_lse, factor)  # [ROWS]
        next_lse = load_lse(lse, t0 + ROWS, rows_to, lse_token, ROWS)
        a, counted = received(
            k_low, k_high, q, q_token * ALIGN, row_lse, s, t0, rows_to, min_distance,
            head_rule, rule, window_left, D, D0, D1, UPCAST, ROWS, window_left is not None,
        )  # [KEYS, ROWS], [KEYS or 1, ROWS]  # fmt: skip
        n_rows = zero.to(tl.int32) + (tl.minimum(t0 + ROWS, rows_to) - t0)  # [KEYS]
        n, mean, m2, m3, m4 = merge_tile(n, mean, m2, m3, m4, a, counted, n_rows)
    # From here on everything is [KEYS]. Rows that see no key of the tile:
    hidden = tl.maximum(end - tl.maximum(rows_to, s + min_distance), 0).to(tl.float32)
    n_seen, mean_seen = n, mean
    n, mean, m2, m3, m4 = merge(n, mean, m2, m3, m4, hidden, zero, zero, zero, zero)
    # Zeros only shrink the mean, to seen / all of it. `merge` subtracts nearly all of it, which would cancel.
    mean = mean_seen * (n_seen / tl.maximum(n, 1.0))
    m2, m3, m4 = m2 / tl.maximum(n, 1.0), m3 / tl.maximum(n, 1.0), m4 / tl.maximum(n, 1.0)
    # A NaN in m2 compares unequal to 0, so that all three moments become NaN.
    flat = (m2 == 0.0) | (n < 2.0)
    safe = tl.where(flat, 1.0, m2)

    live = s < end
    some = end - (s + min_distance) > 0
    out += batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + s
    tl.store(out, n, mask=live)
    tl.store(out + out_moment, tl.where(some, mean / UNITS, 0.0), mask=live)
    tl.store(out + 2 * out_moment, tl.where(n < 2.0, 0.0, m2 / (UNITS * UNITS)), mask=live)
    tl.store(out + 3 * out_moment, tl.where(flat, 0.0, m3 / safe / tl.sqrt(safe)), mask=live)
    tl.store(out + 4 * out_moment, tl.where(flat, 0.0, m4 / safe / safe), mask=live)

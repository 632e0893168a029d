"""Full-horizon FAI: the mean attention every token receives from all later rows of the response, O(T^2 D).

A program keeps a tile of keys and streams the later rows. ``FAI[s]`` is the mean of ``A[t, s]`` over the rows
``t in [s + min_distance, end)``; rows count by position: a row that does not see s because of a sliding window counts
with ``A = 0``.

Rows are the first axis of a product, keys the second, and the sum over rows stays a tile `[ROWS, KEYS]` until after the
loop. A lane of a tensor-core result holds many keys of two rows: it reads two numbers of lse a tile, adds once a pair,
and exchanges nothing with other lanes inside the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .column_moments import column_moments_kernel
from .launch import UNSPECIALIZED, SelectedHeadsLaunch, over_heads
from .score import in_bits, known, nothing, rule_of_head, visible, weight_in_bits
from .tokens import listed_head, load_lse, load_tokens, locate, products


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_stats_kernel(
    q, k, lse, seqs, heads, out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, lse_token: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, min_distance: tl.int32,
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
    whole_to = end
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
        whole_to = tl.minimum(end, first + window_left + 1)
    # A whole tile, where every row counts for every key and sees it, needs no mask. Those at both ends are edges.
    n_before = (KEYS - 1 + ROWS - 1) // ROWS
    whole_from = rows_from + n_before * ROWS
    n_whole = tl.maximum(whole_to - whole_from, 0) // ROWS
    n_edges = tl.cdiv(tl.maximum(rows_to - rows_from, 0), ROWS) - n_whole

    head, q, k, lse_index = listed_head(
        q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN
    )  # fmt: skip
    head_rule = rule_of_head(rule, sequence, head)
    lse += batch_row * lse_batch + lse_index * lse_head
    k_low, k_high = load_tokens(k, first, end, k_token * ALIGN, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
    received = tl.zeros([ROWS, KEYS], tl.float32)
    zero = nothing(head_rule, rule)
    for edge in range(n_edges):
        t0 = rows_from + (edge + tl.where(edge < n_before, 0, n_whole)) * ROWS
        lse_bits = in_bits(known(load_lse(lse, t0, rows_to, lse_token, ROWS), zero), rule)  # [ROWS]
        q_low, q_high = load_tokens(q, t0, rows_to, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
        product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
        t = t0 + tl.arange(0, ROWS)  # [ROWS]
        distance = t[:, None] - s[None, :]  # [ROWS, KEYS]
        a = weight_in_bits(product, lse_bits[:, None], distance, head_rule, rule)  # [ROWS, KEYS]
        counted = (t < rows_to)[:, None] & (distance >= min_distance)  # [ROWS, KEYS]
        received += tl.where(counted & visible(distance, window_left), a, 0.0)
    # lse is loaded a tile ahead, so that the latency of the load is hidden behind a tile's work.
    whole_to = whole_from + n_whole * ROWS
    next_lse = load_lse(lse, whole_from, whole_to, lse_token, ROWS)  # [ROWS]
    for t0 in range(whole_from, whole_to, ROWS):
        lse_bits = in_bits(known(next_lse, zero), rule)  # [ROWS]
        next_lse = load_lse(lse, t0 + ROWS, whole_to, lse_token, ROWS)
        q_low, q_high = load_tokens(q, t0, whole_to, q_token * ALIGN, ROWS, D, D0, D1, UPCAST, False)  # as above
        product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
        t = t0 + tl.arange(0, ROWS)  # [ROWS]
        received += weight_in_bits(product, lse_bits[:, None], t[:, None] - s[None, :], head_rule, rule)

    count = tl.maximum(end - (s + min_distance), 0).to(tl.float32)  # [KEYS]
    mean = tl.where(count > 0, tl.sum(received, 0) / tl.maximum(count, 1.0), 0.0)  # [KEYS]
    tl.store(out + batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + s, mean, mask=s < end)


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
    launch = SelectedHeadsLaunch(name, q, k, lse, rule, owner="keys")
    out = launch.output(5 if moments else 1)
    if moments:
        launch.run(column_moments_kernel, out, out=out, out_moment=out.stride(0), min_distance=min_distance)
    else:
        launch.run(column_stats_kernel, out, out=out, min_distance=min_distance)
    return over_heads(out, per_head)

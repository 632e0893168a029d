"""FAI with a finite horizon from a known log-sum-exp: the band of rows `lo .. hi` after each key, O(T hi D).

``FAI[s] = mean over t in T(s) of A[t, s]``, ``T(s) = { t : s + lo <= t <= min(end - 1, s + hi) }``. The mean's
denominator counts rows by position: a row that does not see s because of a sliding window counts with ``A = 0``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, SelectedHeadsLaunch, over_heads
from .score import in_bits, known, nothing, rule_of_head, weight_in_bits
from .tokens import listed_head, load_lse, load_tokens, locate, products


@triton.jit(do_not_specialize=UNSPECIALIZED)
def band_columns_kernel(
    q, k, lse, seqs, heads, out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, lse_token: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, lo: tl.int32, hi: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, _, end, response, tile, entry = locate(seqs, tiles, n_selected, True)
    first = response + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)  # [KEYS]
    # Only distances that the sliding window shows are read. A is 0 at the others, which `count` below includes.
    farthest = hi
    if window_left is not None:
        farthest = tl.minimum(hi, window_left)
    n_distances = tl.cast(tl.maximum(farthest - lo + 1, 0), tl.uint32)
    # s lies in the response, which ends with the sequence, so every later row does.
    rows_to = tl.minimum(end, first + KEYS + farthest)

    head, q, k, lse_index = listed_head(
        q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN
    )  # fmt: skip
    head_rule = rule_of_head(rule, sequence, head)
    lse += batch_row * lse_batch + lse_index * lse_head
    k_low, k_high = load_tokens(k, first, end, k_token * ALIGN, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
    received = tl.zeros([ROWS, KEYS], tl.float32)
    zero = nothing(head_rule, rule)
    # lse is loaded a tile ahead, so that the latency of the load is hidden behind a tile's work.
    next_lse = load_lse(lse, first + lo, rows_to, lse_token, ROWS)  # [ROWS]
    for t0 in range(first + lo, rows_to, ROWS):
        lse_bits = in_bits(known(next_lse, zero), rule)  # [ROWS]
        next_lse = load_lse(lse, t0 + ROWS, rows_to, lse_token, ROWS)
        q_low, q_high = load_tokens(q, t0, rows_to, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
        product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
        t = t0 + tl.arange(0, ROWS)  # [ROWS]
        a = weight_in_bits(product, lse_bits[:, None], t[:, None] - s[None, :], head_rule, rule)  # [ROWS, KEYS]
        # One unsigned comparison checks both ends of the horizon. Rows past `rows_to` have an lse that makes A 0.
        beyond_lo = (t0 - lo + tl.arange(0, ROWS))[:, None] - s[None, :]  # [ROWS, KEYS]
        received += tl.where(beyond_lo.to(tl.uint32) < n_distances, a, 0.0)

    count = tl.minimum(end - 1, s + hi) - (s + lo) + 1  # [KEYS]
    mean = tl.where(count > 0, tl.sum(received, 0) / tl.maximum(count, 1).to(tl.float32), 0.0)  # [KEYS]
    tl.store(out + batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + s, mean, mask=s < end)


def band_columns(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
    """FAI of every response token, eq. 10, over the rows `lo` to `hi` after it, given `lse`.

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`; float32, bfloat16 or float16, last dimension contiguous.
        lse: `(B, X, T)` float32, natural log.
        lo, hi: the horizon in tokens, `0 <= lo <= hi`.

    Returns:
        `(B, T)` float32, the mean over the heads, or `(B, Hs, T)` with `per_head`; 0 outside the responses and where
        no row lies in the horizon.
    """
    launch = SelectedHeadsLaunch("band_columns", q, k, lse, rule, owner="keys")
    out = launch.output()
    launch.run(band_columns_kernel, out, out=out, lo=lo, hi=hi)
    return over_heads(out, per_head)

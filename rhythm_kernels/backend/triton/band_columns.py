"""FAI with a finite horizon from a known log-sum-exp: the band of rows `lo .. hi` after each key, O(T hi D).

``FAI[s] = mean over t in T(s) of A[t, s]``, ``T(s) = { t : s + lo <= t <= min(end - 1, s + hi) }``. The mean's
denominator counts rows by position: a row that a sliding window keeps from seeing s counts with ``A = 0``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, Problem, over_heads
from .score import in_bits, known, nothing, rule_of_head, weight_in_bits
from .tokens import at_head, load_lse, load_tokens, locate, products


@triton.jit(do_not_specialize=UNSPECIALIZED)
def band_columns_kernel(
    q, k, lse, seqs, heads, out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, lo: tl.int32, hi: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, _, end, response, tile, listed = locate(seqs, tiles, n_heads, True)
    first = response + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)
    # The distances that are read: those a window hides are counted all the same, with A = 0.
    farthest = hi
    if window_left is not None:
        farthest = tl.minimum(hi, window_left)
    n_distances = tl.cast(tl.maximum(farthest - lo + 1, 0), tl.uint32)
    # Rows after s are rows of the response, because s is in it.
    rows_to = tl.minimum(end, first + KEYS + farthest)

    head, q, k, lse_head = at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN)
    own = rule_of_head(rule, sequence, head)
    lse += row * lse_b + lse_head * lse_h
    k_low, k_high = load_tokens(k, first, end, k_t * ALIGN, KEYS, D, D0, D1, UPCAST)
    received = tl.zeros([ROWS, KEYS], tl.float32)
    zero = nothing(own, rule)
    # The log-sum-exp of a tile is asked for a tile ahead: nothing else would wait for it.
    next_lse = load_lse(lse, first + lo, rows_to, lse_t, ROWS)
    for t0 in range(first + lo, rows_to, ROWS):
        lse_bits = in_bits(known(next_lse, zero), rule)
        next_lse = load_lse(lse, t0 + ROWS, rows_to, lse_t, ROWS)
        q_low, q_high = load_tokens(q, t0, rows_to, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)
        product = products(q_low, q_high, k_low, k_high, D1)
        t = t0 + tl.arange(0, ROWS)
        a = weight_in_bits(product, lse_bits[:, None], t[:, None] - s[None, :], own, rule)
        # One unsigned comparison for both ends. Rows past `rows_to` read an lse beside which A is 0.
        beyond_lo = (t0 - lo + tl.arange(0, ROWS))[:, None] - s[None, :]
        received += tl.where(beyond_lo.to(tl.uint32) < n_distances, a, 0.0)

    count = tl.minimum(end - 1, s + hi) - (s + lo) + 1
    mean = tl.where(count > 0, tl.sum(received, 0) / tl.maximum(count, 1).to(tl.float32), 0.0)
    tl.store(out + row * out_b + tl.cast(listed, tl.int64) * out_h + s, mean, mask=s < end)


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
    problem = Problem("band_columns", q, k, lse, rule, owner="keys")
    out = problem.output()
    problem.launch(band_columns_kernel, out, out=out, lo=lo, hi=hi)
    return over_heads(out, per_head)

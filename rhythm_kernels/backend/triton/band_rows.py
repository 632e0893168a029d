"""WAAD from a known log-sum-exp: a band of W keys per row, O(T W D).

``min(t - s, W)`` is W everywhere but on the last W keys, so
``WAAD[t] = W * rowsum[t] - sum_{t-W < s <= t} A[t, s] (W - (t - s))``, ``A[t, s] = exp(x[t, s] - lse[t])``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, Problem, over_heads
from .score import known, logit, nothing, rule_of_head, sink_mass, weight
from .tokens import at_head, load_tokens, locate, products


@triton.jit
def band_sum(q_low, q_high, k_head, k_stride, t, keys_from, keys_to, lse, own, rule, window_left, window,
             D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
             KEYS: tl.constexpr):  # fmt: skip
    """`sum over s visible, t - W < s <= t, of exp(x - lse) (W - (t - s))`: what WAAD lacks of `W rowsum`."""
    band = tl.zeros_like(lse)
    width = window
    if window_left is not None:
        width = tl.minimum(window, window_left + 1)
    width = tl.cast(width, tl.uint32)
    for s0 in range(keys_from, keys_to, KEYS):
        k_low, k_high = load_tokens(k_head, s0, keys_to, k_stride, KEYS, D, D0, D1, UPCAST)
        column = tl.arange(0, KEYS)
        from_s0 = t - s0
        distance = from_s0[:, None] - column[None, :]
        x = logit(products(q_low, q_high, k_low, k_high, D1), distance, own, rule, UNIT)
        # One unsigned comparison for both ends: a negative distance is a large one.
        a = tl.where(distance.to(tl.uint32) < width, weight(x, lse[:, None], UNIT), 0.0)
        # W - (t - s) as a row's part and a column's: exact, as both are below 2^24.
        band += tl.sum(a * ((window - from_s0).to(tl.float32)[:, None] + column.to(tl.float32)[None, :]), 1)
    return band


@triton.jit
def clamp_waad(value, window):
    """WAAD into [0, W] against rounding; NaN fails both comparisons and stays."""
    value = tl.where(value < 0.0, 0.0, value)
    return tl.where(value > window, window, value)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def band_rows_kernel(
    q, k, lse, seqs, heads, out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, start, end, response, tile, listed = locate(seqs, tiles, n_heads, True)
    first = response + tile * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)
    live = t < end
    keys_from = tl.maximum(start, first - window + 1)
    if window_left is not None:
        keys_from = tl.maximum(keys_from, first - window_left)
    keys_to = tl.minimum(end, first + ROWS)
    width = tl.cast(window, tl.float32)

    head, q, k, lse_head = at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN)
    own = rule_of_head(rule, sequence, head)
    row_lse = tl.load(lse + row * lse_b + lse_head * lse_h + t.to(tl.int64) * lse_t, mask=live, other=0.0)
    row_lse = known(row_lse, nothing(own, rule))
    q_low, q_high = load_tokens(q, first, end, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)
    band = band_sum(
        q_low, q_high, k, k_t * ALIGN, t, keys_from, keys_to, row_lse, own, rule, window_left, window,
        D, D0, D1, UPCAST, 1.0, KEYS,
    )  # fmt: skip
    waad = clamp_waad(width * (1.0 - sink_mass(own, rule, row_lse)) - band, width)
    tl.store(out + row * out_b + tl.cast(listed, tl.int64) * out_h + t, waad, mask=live)


def band_rows(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    """WAAD of every response token, eq. 9, given `lse`.

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`; float32, bfloat16 or float16, last dimension contiguous.
        lse: `(B, X, T)` float32, natural log.
        window: W of eq. 9, in tokens.

    Returns:
        `(B, T)` float32, the mean over the heads, or `(B, Hs, T)` with `per_head`; 0 outside the responses.
    """
    problem = Problem("band_rows", q, k, lse, rule)
    out = problem.output()
    problem.launch(band_rows_kernel, out, out=out, window=window)
    return over_heads(out, per_head)

"""WAAD from a known log-sum-exp: a band of W keys a row, O(T W D).

``min(t - s, W)`` is W everywhere but on the last W keys of a row, so
``WAAD[t] = W * rowsum[t] - sum_{t-W < s <= t} A[t, s] (W - (t - s))``, ``A[t, s] = exp(x[t, s] - lse[t])``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, SelectedHeadsLaunch, over_heads
from .score import keys_seen, known, logit, nothing, rule_of_head, sink_mass, weight
from .tokens import listed_head, load_tokens, locate, products


@triton.jit
def band_sum(q_low, q_high, k, k_token, t, keys_from, keys_to, lse, head_rule, rule, window_left, window,
             D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
             KEYS: tl.constexpr):  # fmt: skip
    """`sum over s visible, t - W < s <= t, of exp(x - lse) (W - (t - s))`, a number a row, `[ROWS]`.

    WAAD = W rowsum - this: far keys count W, each of the last W keys counts W - (t - s) less. `k`, `k_token`: where the
    keys of the head begin, and their stride; `t`, `lse`: of the rows, `[ROWS]`, lse in `1 / UNIT` nats.
    """
    band = tl.zeros_like(lse)  # [ROWS]
    width = window
    if window_left is not None:
        width = tl.minimum(window, window_left + 1)
    width = tl.cast(width, tl.uint32)
    for s0 in range(keys_from, keys_to, KEYS):
        k_low, k_high = load_tokens(k, s0, keys_to, k_token, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
        column = tl.arange(0, KEYS)  # [KEYS]
        from_s0 = t - s0  # [ROWS]
        distance = from_s0[:, None] - column[None, :]  # [ROWS, KEYS]
        x = logit(products(q_low, q_high, k_low, k_high, D1), distance, head_rule, rule, UNIT)  # [ROWS, KEYS]
        # One unsigned comparison checks both ends of the band: as unsigned, a negative distance is above any width.
        a = tl.where(distance.to(tl.uint32) < width, weight(x, lse[:, None], UNIT), 0.0)  # [ROWS, KEYS]
        # W - (t - s) is (W - (t - s0)) of the row + (s - s0) of the column: exact, as both are below 2^24.
        band += tl.sum(a * ((window - from_s0).to(tl.float32)[:, None] + column.to(tl.float32)[None, :]), 1)
    return band


@triton.jit
def clamp_waad(value, window):
    """WAAD `[ROWS]` clamped to [0, W], which rounding may leave; a NaN fails both comparisons and stays."""
    value = tl.where(value < 0.0, 0.0, value)
    return tl.where(value > window, window, value)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def band_rows_kernel(
    q, k, lse, seqs, heads, out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, lse_token: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, start, end, response, tile, entry = locate(seqs, tiles, n_selected, True)
    first = response + tile * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)  # [ROWS]
    live = t < end  # [ROWS]
    keys_from, keys_to = keys_seen(tl.maximum(start, first - window + 1), end, first, window_left, ROWS)
    width = tl.cast(window, tl.float32)

    head, q, k, lse_index = listed_head(
        q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN
    )  # fmt: skip
    head_rule = rule_of_head(rule, sequence, head)
    lse += batch_row * lse_batch + lse_index * lse_head
    row_lse = known(tl.load(lse + t.to(tl.int64) * lse_token, mask=live, other=0.0), nothing(head_rule, rule))  # [ROWS]
    q_low, q_high = load_tokens(q, first, end, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
    band = band_sum(
        q_low, q_high, k, k_token * ALIGN, t, keys_from, keys_to, row_lse, head_rule, rule, window_left, window,
        D, D0, D1, UPCAST, 1.0, KEYS,
    )  # [ROWS]  # fmt: skip
    waad = clamp_waad(width * (1.0 - sink_mass(head_rule, rule, row_lse)) - band, width)  # [ROWS]
    tl.store(out + batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + t, waad, mask=live)


def band_rows(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    """WAAD of every response token, eq. 9, given `lse`.

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`; float32, bfloat16 or float16, last dimension contiguous.
        lse: `(B, X, T)` float32, natural log.
        window: W of eq. 9, in tokens.

    Returns:
        `(B, T)` float32, the mean over the heads, or `(B, Hs, T)` with `per_head`; 0 outside the responses.
    """
    launch = SelectedHeadsLaunch("band_rows", q, k, lse, rule)
    out = launch.output()
    launch.run(band_rows_kernel, out, out=out, window=window)
    return over_heads(out, per_head)

"""Log-sum-exp, WAAD and span in one streaming pass over QK^T: an online softmax without values, O(T^2 D).

Beside the running maximum m and the mass ``sum_s exp(x - m)``, each row carries its reach, the span times the mass:
``sum_s exp(x - m) (t - s)``. It is summed as distances: ``t - sum_s A s`` would cancel, and be wrong with sinks. WAAD
follows from the last W keys as in :mod:`.band_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import RowStats, Rule
from .band_rows import band_sum, clamp_waad
from .launch import UNSPECIALIZED, SelectedHeadsLaunch, over_heads
from .score import LN2, LOG2E, absorb_peak, absorb_sink, keys_seen, rule_of_head
from .tokens import listed_head, load_tokens, locate, products


@triton.jit
def absorb(
    peak, mass, reach, q_low, q_high, k, k_token, t, s0, keys_to, head_rule, rule, window_left,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the running maximum (in bits), mass and reach of every row, each `[ROWS]`.

    `WHOLE`: all rows see all keys of the tile.
    """
    column = tl.arange(0, KEYS)  # [KEYS]
    k_low, k_high = load_tokens(k, s0, keys_to, k_token, KEYS, D, D0, D1, UPCAST, not WHOLE)  # [KEYS, D0], [KEYS, D1]
    product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
    distance = t[:, None] - (s0 + column)[None, :]  # [ROWS, KEYS]
    peak, p, fade = absorb_peak(peak, product, distance, head_rule, rule, window_left, not WHOLE)
    tile_mass = tl.sum(p, 1)  # [ROWS]
    tile_reach = (t - s0).to(tl.float32) * tile_mass - tl.sum(p * column.to(tl.float32)[None, :], 1)  # [ROWS]
    return peak, mass * fade + tile_mass, reach * fade + tile_reach


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_stats_kernel(
    q, k, seqs, heads, lse_out, waad_out, span_out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BAND_KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, start, end, response, tile, entry = locate(seqs, tiles, n_selected, False)
    # Later rows have more keys: they go first, so that the last programs to run are short.
    first = response + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)  # [ROWS]
    live = t < end  # [ROWS]
    keys_from, keys_to = keys_seen(start, end, first, window_left, ROWS)
    # Tiles of keys that every row sees need no mask. The others, at both ends, are edges.
    n_before = 0
    if window_left is not None:
        n_before = tl.cdiv(tl.maximum(first + ROWS - 1 - window_left - keys_from, 0), KEYS)
    whole_from = keys_from + n_before * KEYS
    n_whole = tl.maximum(first + 1 - whole_from, 0) // KEYS
    n_edges = tl.cdiv(keys_to - keys_from, KEYS) - n_whole
    band_from = tl.maximum(keys_from, first - window + 1)
    width = tl.cast(window, tl.float32)

    head, q, k, _ = listed_head(
        q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN
    )  # fmt: skip
    head_rule = rule_of_head(rule, sequence, head)
    q_low, q_high = load_tokens(q, first, end, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    reach = tl.zeros([ROWS], tl.float32)
    for s0 in range(whole_from, whole_from + n_whole * KEYS, KEYS):
        peak, mass, reach = absorb(
            peak, mass, reach, q_low, q_high, k, k_token * ALIGN, t, s0, keys_to, head_rule, rule, window_left,
            D, D0, D1, UPCAST, KEYS, True,
        )  # fmt: skip
    for edge in range(n_edges):
        s0 = keys_from + (edge + tl.where(edge < n_before, 0, n_whole)) * KEYS
        peak, mass, reach = absorb(
            peak, mass, reach, q_low, q_high, k, k_token * ALIGN, t, s0, keys_to, head_rule, rule, window_left,
            D, D0, D1, UPCAST, KEYS, False,
        )  # fmt: skip
    # The last W keys are read again with the final maximum: cheaper than to carry a third sum through all the keys.
    band = band_sum(
        q_low, q_high, k, k_token * ALIGN, t, band_from, keys_to, peak, head_rule, rule, window_left, window,
        D, D0, D1, UPCAST, LOG2E, BAND_KEYS,
    )  # [ROWS]  # fmt: skip

    whole = mass  # [ROWS], of the keys and the sink; `mass` stays that of the keys
    if rule.sinks is not None:
        peak, sink, fade = absorb_sink(peak, head_rule)
        mass, reach, band = mass * fade, reach * fade, band * fade
        whole = mass + sink
    lse_out += batch_row * lse_batch + tl.cast(entry, tl.int64) * lse_head + t
    tl.store(lse_out, (peak + tl.log2(whole)) * LN2, mask=live)
    out = batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + t
    tl.store(waad_out + out, clamp_waad((width * mass - band) / whole, width), mask=live)
    tl.store(span_out + out, reach / whole, mask=live)


def row_stats(q: Tensor, k: Tensor, rule: Rule, window: int, per_head: bool) -> RowStats:
    """Log-sum-exp, WAAD (eq. 9) and span (the summand of eq. 7) of every response token.

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`; float32, bfloat16 or float16, last dimension contiguous.
        window: W of eq. 9, in tokens.

    Returns:
        lse `(B, Hs, T)` float32, natural log, a sink included, -inf outside the responses; waad and span `(B, T)`
        float32 in tokens, the mean over the heads, or `(B, Hs, T)` with `per_head`; 0 outside the responses.
    """
    launch = SelectedHeadsLaunch("row_stats", q, k, None, rule)
    waad, span = launch.output(), launch.output()
    lse = torch.full_like(waad, float("-inf"))
    launch.run(
        row_stats_kernel, waad,
        lse_out=lse, lse_batch=lse.stride(0), lse_head=lse.stride(1), waad_out=waad, span_out=span,
        window=window, BAND_KEYS=min(32, launch.tile.keys),
    )  # fmt: skip
    return RowStats(lse, over_heads(waad, per_head), over_heads(span, per_head))

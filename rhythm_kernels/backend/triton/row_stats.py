"""Log-sum-exp, WAAD and span in one streaming pass over QK^T: an online softmax without values, O(T^2 D).

Beside the running maximum m and the mass ``sum_s exp(x - m)``, each row carries ``sum exp(x - m) (t - s)``, the span:
accumulated as distances, since ``t - sum A s`` would cancel, and be wrong with sinks. WAAD follows from the last W keys
as in :mod:`.band_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import RowStats, Rule
from .band_rows import band_sum, clamp_waad
from .launch import UNSPECIALIZED, Problem, over_heads
from .score import LN2, LOG2E, absorb_peak, absorb_sink, rule_of_head
from .tokens import at_head, load_tokens, locate, products


@triton.jit
def absorb(
    peak, mass, reach, q_low, q_high, k_head, k_stride, t, s0, keys_to, own, rule, window_left,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running maximum (in bits), mass and reach of every row; `WHOLE`: all rows see all."""
    column = tl.arange(0, KEYS)
    k_low, k_high = load_tokens(k_head, s0, keys_to, k_stride, KEYS, D, D0, D1, UPCAST, not WHOLE)
    product = products(q_low, q_high, k_low, k_high, D1)
    distance = t[:, None] - (s0 + column)[None, :]
    peak, p, fade = absorb_peak(peak, product, distance, own, rule, window_left, not WHOLE)
    tile_mass = tl.sum(p, 1)
    tile_reach = (t - s0).to(tl.float32) * tile_mass - tl.sum(p * column.to(tl.float32)[None, :], 1)
    return peak, mass * fade + tile_mass, reach * fade + tile_reach


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_stats_kernel(
    q, k, seqs, heads, lse_out, waad_out, span_out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BAND_KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, start, end, response, tile, listed = locate(seqs, tiles, n_heads, False)
    # Later rows have more keys: they go first, so that no long program is left at the end.
    first = response + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)
    live = t < end
    keys_from = start
    if window_left is not None:
        keys_from = tl.maximum(start, first - window_left)
    keys_to = tl.minimum(end, first + ROWS)
    # Tiles of keys that every row sees need no mask. The others, at both ends, are edges.
    n_before = 0
    if window_left is not None:
        n_before = tl.cdiv(tl.maximum(first + ROWS - 1 - window_left - keys_from, 0), KEYS)
    whole_from = keys_from + n_before * KEYS
    n_whole = tl.maximum(first + 1 - whole_from, 0) // KEYS
    n_edges = tl.cdiv(keys_to - keys_from, KEYS) - n_whole
    band_from = tl.maximum(keys_from, first - window + 1)
    width = tl.cast(window, tl.float32)

    head, q, k, _ = at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN)
    own = rule_of_head(rule, sequence, head)
    q_low, q_high = load_tokens(q, first, end, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    reach = tl.zeros([ROWS], tl.float32)
    for s0 in range(whole_from, whole_from + n_whole * KEYS, KEYS):
        peak, mass, reach = absorb(
            peak, mass, reach, q_low, q_high, k, k_t * ALIGN, t, s0, keys_to, own, rule, window_left,
            D, D0, D1, UPCAST, KEYS, True,
        )  # fmt: skip
    for edge in range(n_edges):
        s0 = keys_from + (edge + tl.where(edge < n_before, 0, n_whole)) * KEYS
        peak, mass, reach = absorb(
            peak, mass, reach, q_low, q_high, k, k_t * ALIGN, t, s0, keys_to, own, rule, window_left,
            D, D0, D1, UPCAST, KEYS, False,
        )  # fmt: skip
    # The band is met again with the final maximum: cheaper than a third sum carried through all the keys.
    band = band_sum(
        q_low, q_high, k, k_t * ALIGN, t, band_from, keys_to, peak, own, rule, window_left, window,
        D, D0, D1, UPCAST, LOG2E, BAND_KEYS,
    )  # fmt: skip

    whole = mass
    if rule.sinks is not None:
        peak, sink, fade = absorb_sink(peak, own)
        mass, reach, band = mass * fade, reach * fade, band * fade
        whole = mass + sink
    lse_out += row * lse_b + tl.cast(listed, tl.int64) * lse_h + t
    tl.store(lse_out, (peak + tl.log2(whole)) * LN2, mask=live)
    out = row * out_b + tl.cast(listed, tl.int64) * out_h + t
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
    problem = Problem("row_stats", q, k, None, rule)
    waad, span = problem.output(), problem.output()
    lse = q.new_full((problem.batch, problem.n_selected, problem.length), float("-inf"), dtype=torch.float32)
    problem.launch(
        row_stats_kernel, waad,
        lse_out=lse, lse_b=lse.stride(0), lse_h=lse.stride(1), waad_out=waad, span_out=span,
        window=window, BAND_KEYS=min(32, problem.tile.keys),
    )  # fmt: skip
    return RowStats(lse, over_heads(waad, per_head), over_heads(span, per_head))

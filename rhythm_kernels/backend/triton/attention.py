"""Causal attention with its log-sum-exp, WAAD and span in one pass: a FlashAttention forward that also measures.

One program owns a tile of rows of one query head and streams the keys once. Beside FlashAttention's running maximum m,
mass ``sum_s exp(x - m)`` and mixture ``sum_s exp(x - m) v_s``, the selected heads carry two numbers a row:

- reach ``sum_s exp(x - m) (t - s)``, the span times the mass, accumulated as distances. In a tile of keys from s0 on it
  is ``(t - s0) mass - sum p (s - s0)``: one FMA an element, beside the maximum, the FMA under the exponential, the
  exponential, the sum and the rescaling of the mixture that attention itself spends, and no product more.
- WAAD ``sum_s exp(x - m) min(t - s, W)``. Keys before ``first - W + 1`` are at least W away from every row of the tile,
  and there it is W times the mass: nothing is carried. Only the tiles with the last W keys add ``p min(t - s, W)``:
  a subtraction, a minimum and an FMA an element, in at most two tiles more than the diagonal needs for its mask.

So the products are FlashAttention's own, ``2 T^2 D`` operations in all, and the rhythm costs ``T^2 / 2`` FMA a selected
head on units that mostly wait for the tensor cores: compiled for sm_90 (bfloat16, D = 128) the loop over whole tiles
has 435 instructions a warp and tile of 128 x 64, and 373 without the rhythm. Heads that are not selected run the kernel
without it. The mean over heads is taken of per-head values in O(H_selected T) memory, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import Attended, Rule
from .band_rows import clamp_waad
from .launch import UNSPECIALIZED, AttentionProblem
from .score import LN2, absorb_peak, absorb_sink, rule_of_head
from .tokens import accumulate, listed_at, load_tokens, locate, products, store_tokens


@triton.jit
def absorb(
    peak, mass, reach, near, o_low, o_high, q_low, q_high, k_head, k_stride, v_head, v_stride, t, s0, keys_to,
    own, rule, window_left, width, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, SOME_HIDDEN: tl.constexpr,
    REACH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running maximum (in bits) of every row and the sums that are relative to it."""
    column = tl.arange(0, KEYS)
    k_low, k_high = load_tokens(k_head, s0, keys_to, k_stride, KEYS, D, D0, D1, UPCAST, SOME_HIDDEN)
    product = products(q_low, q_high, k_low, k_high, D1)
    distance = t[:, None] - (s0 + column)[None, :]
    peak, p, fade = absorb_peak(peak, product, distance, own, rule, window_left, SOME_HIDDEN)
    tile_mass = tl.sum(p, 1)
    if REACH:
        # Distances are split at the tile's first key: (t - s0) of the row, and the column.
        from_s0 = (t - s0).to(tl.float32)
        column_of_key = column.to(tl.float32)[None, :]
        reach = reach * fade + (from_s0 * tile_mass - tl.sum(p * column_of_key, 1))
        if NEAR:
            near = near * fade + tl.sum(p * tl.minimum(from_s0[:, None] - column_of_key, width), 1)
    v_low, v_high = load_tokens(v_head, s0, keys_to, v_stride, KEYS, DV, V0, V1, UPCAST, SOME_HIDDEN)
    o_low = o_low * fade[:, None]
    if V1 > 0:
        o_high = o_high * fade[:, None]
    o_low, o_high = accumulate(o_low, o_high, p, v_low, v_high, V1)
    return peak, mass * fade + tile_mass, reach, near, o_low, o_high


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_kernel(
    q, k, v, o, seqs, heads, lse_out, waad_out, span_out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, o_b: tl.int64, o_t: tl.int64, o_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, out_b: tl.int64, out_h: tl.int64,
    tiles: tl.int32, groups: tl.int32, n_heads: tl.int32, kv_group: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, RHYTHM: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, start, end, response, tile, head = locate(seqs, tiles, groups, False)
    # Later rows have more keys: they go first, so that no long program is left at the end.
    first = start + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    index = listed_at(heads, n_heads, head)
    if not ALL and (index >= 0) != RHYTHM:
        return
    t = first + tl.arange(0, ROWS)
    live = t < end
    keys_from = start
    if window_left is not None:
        keys_from = tl.maximum(start, first - window_left)
    keys_to = tl.minimum(end, first + ROWS)
    # From `near_from` on, tiles have a key that some row does not see, or one of the last W keys of some row.
    unlike = first + 1
    if RHYTHM:
        unlike = tl.minimum(unlike, first - window + 1)
    near_from = keys_from + tl.maximum(unlike - keys_from, 0) // KEYS * KEYS
    width = tl.cast(window, tl.float32)

    own = rule_of_head(rule, sequence, head)
    q += row * q_b * ALIGN + tl.cast(head, tl.int64) * q_h * ALIGN
    k += row * k_b * ALIGN + tl.cast(head // kv_group, tl.int64) * k_h * ALIGN
    v += row * v_b * ALIGN + tl.cast(head // kv_group, tl.int64) * v_h * ALIGN
    o += row * o_b * ALIGN + tl.cast(head, tl.int64) * o_h * ALIGN
    q_low, q_high = load_tokens(q, first, end, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    reach = tl.zeros([ROWS], tl.float32)
    near = tl.zeros([ROWS], tl.float32)
    o_low = tl.zeros([ROWS, V0], tl.float32)
    o_high = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    far_from = keys_from
    if window_left is not None:
        # Keys that the window hides from the later rows of the tile.
        hidden = tl.maximum(first + ROWS - 1 - window_left - keys_from, 0)
        far_from = tl.minimum(keys_from + tl.cdiv(hidden, KEYS) * KEYS, near_from)
        for s0 in range(keys_from, far_from, KEYS):
            peak, mass, reach, near, o_low, o_high = absorb(
                peak, mass, reach, near, o_low, o_high, q_low, q_high, k, k_t * ALIGN, v, v_t * ALIGN, t, s0, keys_to,
                own, rule, window_left, width, D, D0, D1, DV, V0, V1, UPCAST,
                KEYS, True, RHYTHM, False,
            )  # fmt: skip
    for s0 in range(far_from, near_from, KEYS):
        peak, mass, reach, near, o_low, o_high = absorb(
            peak, mass, reach, near, o_low, o_high, q_low, q_high, k, k_t * ALIGN, v, v_t * ALIGN, t, s0, keys_to,
            own, rule, window_left, width, D, D0, D1, DV, V0, V1, UPCAST,
            KEYS, False, RHYTHM, False,
        )  # fmt: skip
    near = width * mass
    for s0 in range(near_from, keys_to, KEYS):
        peak, mass, reach, near, o_low, o_high = absorb(
            peak, mass, reach, near, o_low, o_high, q_low, q_high, k, k_t * ALIGN, v, v_t * ALIGN, t, s0, keys_to,
            own, rule, window_left, width, D, D0, D1, DV, V0, V1, UPCAST,
            KEYS, True, RHYTHM, RHYTHM,
        )  # fmt: skip

    if rule.sinks is not None:
        peak, sink, fade = absorb_sink(peak, own)
        mass, reach, near = mass * fade + sink, reach * fade, near * fade
        o_low = o_low * fade[:, None]
        if V1 > 0:
            o_high = o_high * fade[:, None]
    o_low = o_low / mass[:, None]
    if V1 > 0:
        o_high = o_high / mass[:, None]
    store_tokens(o, first, end, o_t * ALIGN, o_low, o_high, ROWS, DV, V0, V1)
    # One rounding at the size of lse, the last: the backward pass scales whole rows by its error.
    lse = peak * LN2 + tl.log2(mass) * LN2
    tl.store(lse_out + row * lse_b + tl.cast(head, tl.int64) * lse_h + t, lse, mask=live)
    if RHYTHM:
        out = row * out_b + tl.cast(index, tl.int64) * out_h + t
        scored = live & (t >= tl.where(index >= 0, response, end))
        tl.store(waad_out + out, clamp_waad(near / mass, width), mask=scored)
        tl.store(span_out + out, reach / mass, mask=scored)


def attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, per_head: bool) -> Attended:
    """Attention output, log-sum-exp, WAAD (eq. 9) and span (the summand of eq. 7).

    Args:
        q: `(B, T, H, D)`, k: `(B, T, H_kv, D)`, v: `(B, T, H_kv, D_v)`; float32, bfloat16 or float16, last dimension
            contiguous.
        window: W of eq. 9, in tokens.

    Returns:
        out `(B, T, H, D_v)` in v's dtype, every live row of every head, 0 elsewhere; lse `(B, H, T)` float32, natural
        log, a sink included, -inf elsewhere; waad and span `(B, T)` float32 in tokens, the mean over the heads of the
        table, or `(B, Hs, T)` with `per_head`; 0 outside the responses.
    """
    problem = AttentionProblem(q, k, v, rule)
    batch, length, n_heads, _ = q.shape
    n_selected = rule.heads.shape[0]
    out = q.new_zeros((batch, length, n_heads, v.shape[3]), dtype=problem.stored)
    lse = q.new_full((batch, n_heads, length), float("-inf"), dtype=torch.float32)
    waad, span = (q.new_zeros((batch, n_selected, length), dtype=torch.float32) for _ in range(2))
    for name, rhythm in (("attention", True), ("attention_alone", False)):
        if rhythm or n_selected < n_heads:
            problem.launch(
                name, attention_kernel, "rows", n_heads, {"o": out},
                heads=rule.heads, n_heads=n_selected,
                lse_out=lse, lse_b=lse.stride(0), lse_h=lse.stride(1),
                waad_out=waad, span_out=span, out_b=waad.stride(0), out_h=waad.stride(1),
                window=window, RHYTHM=rhythm, ALL=n_selected == n_heads,
            )  # fmt: skip
    if not per_head:
        waad, span = waad.mean(1), span.mean(1)
    return Attended(out.to(v.dtype), lse, waad, span)

"""Causal attention with its log-sum-exp, WAAD and span in one pass: a FlashAttention forward that also measures.

One program owns a tile of rows of one query head and streams the keys once. Beside FlashAttention's running maximum m,
mass ``sum_s exp(x - m)`` and output ``sum_s exp(x - m) v_s``, a selected head carries two numbers a row:

- reach, ``sum_s exp(x - m) (t - s)``, the span times the mass, summed as distances. With ``p = exp(x - m)``, a tile of
  keys from s0 on adds ``(t - s0) sum p - sum p (s - s0)``: one FMA an element more than attention needs.
- near, ``sum_s exp(x - m) min(t - s, W)``, WAAD times the mass. Keys before ``first - W + 1`` are at least W away from
  every row of the tile, so that up to there near is W times the mass, and nothing is carried. Only tiles from that key
  on add ``p min(t - s, W)``: a subtraction, a minimum and an FMA an element, in at most two tiles more than the
  diagonal's, which need a mask anyway.

So the products are FlashAttention's own, ``2 T^2 D`` operations in all, and the measures cost ``T^2 / 2`` FMA a head,
on units that mostly wait for the tensor cores: compiled for sm_90 (bfloat16, D = 128) the loop over whole tiles has 435
instructions a warp and tile of 128 x 64, and 373 without the measures. Heads that are not selected run the kernel
without them. The mean over heads is taken of per-head values, in O(H_selected T) memory and a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import Attended, Rule
from .band_rows import clamp_waad
from .launch import UNSPECIALIZED, AttentionLaunch
from .score import LN2, absorb_peak, absorb_sink, keys_seen, rule_of_head
from .tokens import accumulate, at_head, entry_of, load_tokens, locate, products, store_tokens


@triton.jit
def absorb(
    peak, mass, reach, near, o_low, o_high, q_low, q_high, k, k_token, v, v_token, t, s0, keys_to,
    head_rule, rule, window_left, width, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, SOME_HIDDEN: tl.constexpr,
    REACH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into the running maximum (in bits) of every row and the sums that are relative to it.

    `peak`, `mass`, `reach`, `near`: `[ROWS]`. `o_low`, `o_high`: `[ROWS, V0]`, `[ROWS, V1]`. `SOME_HIDDEN`: some row
    does not see some key of the tile. `REACH`: the head is selected. `NEAR`: some key is less than W before some row.
    """
    column = tl.arange(0, KEYS)  # [KEYS]
    k_low, k_high = load_tokens(k, s0, keys_to, k_token, KEYS, D, D0, D1, UPCAST, SOME_HIDDEN)  # [KEYS, D0], [KEYS, D1]
    product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
    distance = t[:, None] - (s0 + column)[None, :]  # [ROWS, KEYS]
    peak, p, fade = absorb_peak(peak, product, distance, head_rule, rule, window_left, SOME_HIDDEN)
    tile_mass = tl.sum(p, 1)  # [ROWS]
    if REACH:
        # Distances are split at the tile's first key: (t - s0) of the row, and the column.
        from_s0 = (t - s0).to(tl.float32)  # [ROWS]
        column_of_key = column.to(tl.float32)[None, :]  # [1, KEYS]
        reach = reach * fade + (from_s0 * tile_mass - tl.sum(p * column_of_key, 1))
        if NEAR:
            near = near * fade + tl.sum(p * tl.minimum(from_s0[:, None] - column_of_key, width), 1)
    v_low, v_high = load_tokens(v, s0, keys_to, v_token, KEYS, DV, V0, V1, UPCAST, SOME_HIDDEN)  # [KEYS, V0], ..V1]
    o_low = o_low * fade[:, None]
    if V1 > 0:
        o_high = o_high * fade[:, None]
    o_low, o_high = accumulate(o_low, o_high, p, v_low, v_high, V1)
    return peak, mass * fade + tile_mass, reach, near, o_low, o_high


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_kernel(
    q, k, v, o, seqs, heads, lse_out, waad_out, span_out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, o_batch: tl.int64, o_token: tl.int64, o_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64, out_batch: tl.int64, out_head: tl.int64,
    tiles: tl.int32, n_heads: tl.int32, n_selected: tl.int32, kv_group_size: tl.int32,
    rule, window_left, window: tl.int32,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, RHYTHM: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, start, end, response, tile, head = locate(seqs, tiles, n_heads, False)
    # Later rows have more keys: they go first, so that the last programs to run are short.
    first = start + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    entry = entry_of(heads, n_selected, head)
    if not ALL and (entry >= 0) != RHYTHM:
        return
    t = first + tl.arange(0, ROWS)  # [ROWS]
    live = t < end  # [ROWS]
    keys_from, keys_to = keys_seen(start, end, first, window_left, ROWS)
    # From `near_from` on, tiles have a key that some row does not see, or one of the last W keys of some row.
    unlike = first + 1
    if RHYTHM:
        unlike = tl.minimum(unlike, first - window + 1)
    near_from = keys_from + tl.maximum(unlike - keys_from, 0) // KEYS * KEYS
    width = tl.cast(window, tl.float32)

    head_rule = rule_of_head(rule, sequence, head)
    q = at_head(q, batch_row, head, q_batch, q_head, ALIGN)
    k = at_head(k, batch_row, head, k_batch, k_head, ALIGN, kv_group_size)
    v = at_head(v, batch_row, head, v_batch, v_head, ALIGN, kv_group_size)
    o = at_head(o, batch_row, head, o_batch, o_head, ALIGN)
    q_low, q_high = load_tokens(q, first, end, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    reach = tl.zeros([ROWS], tl.float32)
    near = tl.zeros([ROWS], tl.float32)
    o_low = tl.zeros([ROWS, V0], tl.float32)
    o_high = tl.zeros([ROWS, V1 if V1 > 0 else 16], tl.float32)
    far_from = keys_from
    if window_left is not None:
        # Keys that the sliding window hides from the later rows of the tile.
        hidden = tl.maximum(first + ROWS - 1 - window_left - keys_from, 0)
        far_from = tl.minimum(keys_from + tl.cdiv(hidden, KEYS) * KEYS, near_from)
    # Tiles with keys that the sliding window hides from some row; whole tiles, all W or more away; and the rest.
    bounds = (keys_from, far_from, near_from, keys_to)
    for part in tl.static_range(0 if window_left is not None else 1, 3):
        if part == 2:
            near = width * mass
        for s0 in range(bounds[part], bounds[part + 1], KEYS):
            peak, mass, reach, near, o_low, o_high = absorb(
                peak, mass, reach, near, o_low, o_high, q_low, q_high, k, k_token * ALIGN, v, v_token * ALIGN, t, s0,
                keys_to, head_rule, rule, window_left, width, D, D0, D1, DV, V0, V1, UPCAST,
                KEYS, part != 1, RHYTHM, part == 2,
            )  # fmt: skip

    if rule.sinks is not None:
        peak, sink, fade = absorb_sink(peak, head_rule)
        mass, reach, near = mass * fade + sink, reach * fade, near * fade
        o_low = o_low * fade[:, None]
        if V1 > 0:
            o_high = o_high * fade[:, None]
    o_low = o_low / mass[:, None]
    if V1 > 0:
        o_high = o_high / mass[:, None]
    store_tokens(o, first, end, o_token * ALIGN, o_low, o_high, ROWS, DV, V0, V1)
    # Only the last addition rounds at the size of lse: the backward pass scales whole rows by the error of lse.
    lse = peak * LN2 + tl.log2(mass) * LN2  # [ROWS]
    tl.store(lse_out + batch_row * lse_batch + tl.cast(head, tl.int64) * lse_head + t, lse, mask=live)
    if RHYTHM:
        out = batch_row * out_batch + tl.cast(entry, tl.int64) * out_head + t  # [ROWS]
        scored = live & (t >= tl.where(entry >= 0, response, end))  # [ROWS]
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
    launch = AttentionLaunch(q, k, v, rule)
    batch, length, n_heads, _ = q.shape
    n_selected = rule.heads.shape[0]
    out = q.new_zeros((batch, length, n_heads, v.shape[3]), dtype=launch.stored)
    lse = q.new_full((batch, n_heads, length), float("-inf"), dtype=torch.float32)
    waad, span = (q.new_zeros((batch, n_selected, length), dtype=torch.float32) for _ in range(2))
    for name, rhythm in (("attention", True), ("attention_alone", False)):
        if rhythm or n_selected < n_heads:
            launch.run(
                name, attention_kernel, "rows", n_heads, {"o": out},
                heads=rule.heads, n_heads=n_heads, n_selected=n_selected,
                lse_out=lse, lse_batch=lse.stride(0), lse_head=lse.stride(1),
                waad_out=waad, span_out=span, out_batch=waad.stride(0), out_head=waad.stride(1),
                window=window, RHYTHM=rhythm, ALL=n_selected == n_heads,
            )  # fmt: skip
    if not per_head:
        waad, span = waad.mean(1), span.mean(1)
    return Attended(out.to(v.dtype), lse, waad, span)

"""Gradients of causal attention: the maps are made again from the log-sum-exp, a tile at a time, in O(T) memory.

With ``P = exp(x - lse)``: ``dV = P^T dO``, ``dx = P (dO V^T - delta)``, ``delta = rowsum(dO O)``, times the softcap's
slope ``1 - (x / softcap)^2``; then ``dQ = scale dx K`` and ``dK = scale dx^T Q``. A sink is a column without a value:
it is in lse, and changes nothing else. Two kernels, ``3 T^2 D`` and ``4 T^2 D`` operations: one keeps a tile of rows
and gives delta and dQ, the other keeps a tile of keys of one kv head, passes over the rows of every query head of its
group, and gives dK and dV. Rounding lse to float32 scales a whole row of P; beside float32 inputs that would be seen,
so there the first kernel also sums P and gives the factor that makes the sum 1 again. Each output element has one owner
and one order of summation: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, AttentionProblem
from .score import LOG2E, rule_of_head, sink_mass, visible, weight_and_slope
from .tokens import accumulate, load_lse, load_tokens, locate, products, store_tokens


@triton.jit
def dq_tile(
    dq_low, dq_high, mass, q_low, q_high, do_low, do_high, lse, delta, k_head, k_stride, v_head, v_stride, t, s0,
    keys_to, own, rule, window_left, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
    SOME_HIDDEN: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ of a tile of rows, and to the sum of P, which is kept in nats."""
    k_low, k_high = load_tokens(k_head, s0, keys_to, k_stride, KEYS, D, D0, D1, UPCAST)
    v_low, v_high = load_tokens(v_head, s0, keys_to, v_stride, KEYS, DV, V0, V1, UPCAST)
    product = products(q_low, q_high, k_low, k_high, D1)
    distance = t[:, None] - (s0 + tl.arange(0, KEYS))[None, :]
    p, slope = weight_and_slope(product, lse[:, None], distance, own, rule, UNIT)
    if SOME_HIDDEN:
        seen = visible(distance, window_left)
        p = tl.where(seen, p, 0.0)
    if UNIT == 1.0:
        mass += tl.sum(p, 1)
    dx = p * (products(do_low, do_high, v_low, v_high, V1) - delta[:, None]) * slope
    if SOME_HIDDEN:
        dx = tl.where(seen, dx, 0.0)  # what is not finite in V stays out of rows that do not see it
    dq_low, dq_high = accumulate(dq_low, dq_high, dx, k_low, k_high, D1)
    return dq_low, dq_high, mass


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(
    q, k, v, o, do, dq, seqs, lse, delta_out, lse_out, mended_out,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, o_b: tl.int64, o_t: tl.int64, o_h: tl.int64,
    do_b: tl.int64, do_t: tl.int64, do_h: tl.int64, dq_b: tl.int64, dq_t: tl.int64, dq_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, tiles: tl.int32, groups: tl.int32, kv_group: tl.int32,
    rule, window_left,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, row, start, end, _, tile, head = locate(seqs, tiles, groups, False)
    # Later rows have more keys: they go first.
    first = start + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)
    keys_from = start
    if window_left is not None:
        keys_from = tl.maximum(start, first - window_left)
    keys_to = tl.minimum(end, first + ROWS)

    own = rule_of_head(rule, sequence, head)
    q += row * q_b * ALIGN + tl.cast(head, tl.int64) * q_h * ALIGN
    k += row * k_b * ALIGN + tl.cast(head // kv_group, tl.int64) * k_h * ALIGN
    v += row * v_b * ALIGN + tl.cast(head // kv_group, tl.int64) * v_h * ALIGN
    o += row * o_b * ALIGN + tl.cast(head, tl.int64) * o_h * ALIGN
    do += row * do_b * ALIGN + tl.cast(head, tl.int64) * do_h * ALIGN
    dq += row * dq_b * ALIGN + tl.cast(head, tl.int64) * dq_h * ALIGN
    of_head = row * lse_b + tl.cast(head, tl.int64) * lse_h
    do_low, do_high = load_tokens(do, first, end, do_t * ALIGN, ROWS, DV, V0, V1, UPCAST)
    o_low, o_high = load_tokens(o, first, end, o_t * ALIGN, ROWS, DV, V0, V1, UPCAST)
    delta = tl.sum(do_low.to(tl.float32) * o_low.to(tl.float32), 1)
    if V1 > 0:
        delta += tl.sum(do_high.to(tl.float32) * o_high.to(tl.float32), 1)
    tl.store(delta_out + of_head + t, delta, mask=t < end)
    # In bits, scaling and subtraction are one FMA; in nats less is rounded, which is seen beside float32 inputs.
    UNIT: tl.constexpr = 1.0 if do_low.dtype == tl.float32 else LOG2E
    row_lse = load_lse(lse + of_head, first, end, 1, ROWS)
    row_lse *= UNIT
    tl.store(lse_out + of_head + t, row_lse, mask=t < end)
    q_low, q_high = load_tokens(q, first, end, q_t * ALIGN, ROWS, D, D0, D1, UPCAST)

    dq_low = tl.zeros([ROWS, D0], tl.float32)
    dq_high = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    edge = keys_from + (first + 1 - keys_from) // KEYS * KEYS
    far_from = keys_from
    if window_left is not None:
        # Keys that the window hides from the later rows of the tile.
        hidden = tl.maximum(first + ROWS - 1 - window_left - keys_from, 0)
        far_from = tl.minimum(keys_from + tl.cdiv(hidden, KEYS) * KEYS, edge)
        for s0 in range(keys_from, far_from, KEYS):
            dq_low, dq_high, mass = dq_tile(
                dq_low, dq_high, mass, q_low, q_high, do_low, do_high, row_lse, delta, k, k_t * ALIGN, v,
                v_t * ALIGN, t, s0, keys_to, own, rule, window_left, D, D0, D1, DV, V0, V1, UPCAST, KEYS, UNIT, True,
            )  # fmt: skip
    for s0 in range(far_from, edge, KEYS):
        dq_low, dq_high, mass = dq_tile(
            dq_low, dq_high, mass, q_low, q_high, do_low, do_high, row_lse, delta, k, k_t * ALIGN, v,
            v_t * ALIGN, t, s0, keys_to, own, rule, window_left, D, D0, D1, DV, V0, V1, UPCAST, KEYS, UNIT, False,
        )  # fmt: skip
    for s0 in range(edge, keys_to, KEYS):
        dq_low, dq_high, mass = dq_tile(
            dq_low, dq_high, mass, q_low, q_high, do_low, do_high, row_lse, delta, k, k_t * ALIGN, v,
            v_t * ALIGN, t, s0, keys_to, own, rule, window_left, D, D0, D1, DV, V0, V1, UPCAST, KEYS, UNIT, True,
        )  # fmt: skip
    factor = tl.cast(rule.scale, tl.float32) + tl.zeros_like(delta)
    if UNIT == 1.0:
        if rule.sinks is not None:
            mass += sink_mass(own, rule, row_lse)
        mended = tl.where(mass > 0, 1.0 / mass, 0.0)
        tl.store(mended_out + of_head + t, mended, mask=t < end)
        factor *= mended
    store_tokens(dq, first, end, dq_t * ALIGN, dq_low * factor[:, None], dq_high * factor[:, None], ROWS, D, D0, D1)


@triton.jit
def dkv_tile(
    dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q_head, q_stride, do_head, do_stride, lse_head,
    delta_head, mended_head, s, t0, rows_to, own, rule, window_left, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    SOME_HIDDEN: tl.constexpr,
):  # fmt: skip
    """What one tile of rows of one query head adds to dK and dV of a tile of keys; the map is `(keys, rows)` here."""
    UNIT: tl.constexpr = 1.0 if k_low.dtype == tl.float32 else LOG2E
    local = tl.arange(0, ROWS)
    q_low, q_high = load_tokens(q_head, t0, rows_to, q_stride, ROWS, D, D0, D1, UPCAST)
    do_low, do_high = load_tokens(do_head, t0, rows_to, do_stride, ROWS, DV, V0, V1, UPCAST)
    lse = load_lse(lse_head, t0, rows_to, 1, ROWS)
    delta = tl.load(delta_head + t0 + local, mask=t0 + local < rows_to, other=0.0)
    product = products(k_low, k_high, q_low, q_high, D1)
    distance = (t0 + local)[None, :] - s[:, None]
    p, slope = weight_and_slope(product, lse[None, :], distance, own, rule, UNIT)
    if UNIT == 1.0:
        p *= tl.load(mended_head + t0 + local, mask=t0 + local < rows_to, other=0.0)[None, :]
    if SOME_HIDDEN:
        seen = visible(distance, window_left)
        p = tl.where(seen, p, 0.0)
    dv_low, dv_high = accumulate(dv_low, dv_high, p, do_low, do_high, V1)
    dx = p * (products(v_low, v_high, do_low, do_high, V1) - delta[None, :]) * slope
    if SOME_HIDDEN:
        dx = tl.where(seen, dx, 0.0)
    dk_low, dk_high = accumulate(dk_low, dk_high, dx, q_low, q_high, D1)
    return dk_low, dk_high, dv_low, dv_high


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkv_kernel(
    q, k, v, do, dk, dv, seqs, lse, delta, mended,
    q_b: tl.int64, q_t: tl.int64, q_h: tl.int64, k_b: tl.int64, k_t: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_t: tl.int64, v_h: tl.int64, do_b: tl.int64, do_t: tl.int64, do_h: tl.int64,
    dk_b: tl.int64, dk_t: tl.int64, dk_h: tl.int64, dv_b: tl.int64, dv_t: tl.int64, dv_h: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, tiles: tl.int32, groups: tl.int32, kv_group: tl.int32,
    rule, window_left,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Earlier keys have more rows, and come first as it is.
    sequence, row, start, end, _, tile, kv_head = locate(seqs, tiles, groups, False)
    first = start + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)
    # The first row tile without a key that is still to come, and the last one that the window leaves whole.
    whole_from = first + tl.cdiv(KEYS - 1, ROWS) * ROWS
    rows_to = end
    whole_to = end
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
        whole_to = whole_from + tl.maximum(first + window_left + 1 - whole_from, 0) // ROWS * ROWS

    k += row * k_b * ALIGN + tl.cast(kv_head, tl.int64) * k_h * ALIGN
    v += row * v_b * ALIGN + tl.cast(kv_head, tl.int64) * v_h * ALIGN
    dk += row * dk_b * ALIGN + tl.cast(kv_head, tl.int64) * dk_h * ALIGN
    dv += row * dv_b * ALIGN + tl.cast(kv_head, tl.int64) * dv_h * ALIGN
    k_low, k_high = load_tokens(k, first, end, k_t * ALIGN, KEYS, D, D0, D1, UPCAST)
    v_low, v_high = load_tokens(v, first, end, v_t * ALIGN, KEYS, DV, V0, V1, UPCAST)
    q += row * q_b * ALIGN
    do += row * do_b * ALIGN
    dk_low = tl.zeros([KEYS, D0], tl.float32)
    dk_high = tl.zeros([KEYS, D1 if D1 > 0 else 16], tl.float32)
    dv_low = tl.zeros([KEYS, V0], tl.float32)
    dv_high = tl.zeros([KEYS, V1 if V1 > 0 else 16], tl.float32)
    for head in range(kv_head * kv_group, (kv_head + 1) * kv_group):
        own = rule_of_head(rule, sequence, head)
        q_head = q + tl.cast(head, tl.int64) * q_h * ALIGN
        do_head = do + tl.cast(head, tl.int64) * do_h * ALIGN
        of_head = row * lse_b + tl.cast(head, tl.int64) * lse_h
        for t0 in range(first, tl.minimum(whole_from, rows_to), ROWS):
            dk_low, dk_high, dv_low, dv_high = dkv_tile(
                dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q_head, q_t * ALIGN, do_head,
                do_t * ALIGN, lse + of_head, delta + of_head, mended + of_head, s, t0, rows_to, own, rule,
                window_left, D, D0, D1, DV, V0, V1, UPCAST, ROWS, True,
            )  # fmt: skip
        for t0 in range(whole_from, tl.minimum(whole_to, rows_to), ROWS):
            dk_low, dk_high, dv_low, dv_high = dkv_tile(
                dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q_head, q_t * ALIGN, do_head,
                do_t * ALIGN, lse + of_head, delta + of_head, mended + of_head, s, t0, rows_to, own, rule,
                window_left, D, D0, D1, DV, V0, V1, UPCAST, ROWS, False,
            )  # fmt: skip
        if window_left is not None:
            for t0 in range(whole_to, rows_to, ROWS):
                dk_low, dk_high, dv_low, dv_high = dkv_tile(
                    dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q_head, q_t * ALIGN, do_head,
                    do_t * ALIGN, lse + of_head, delta + of_head, mended + of_head, s, t0, rows_to, own, rule,
                    window_left, D, D0, D1, DV, V0, V1, UPCAST, ROWS, True,
                )  # fmt: skip
    scale = tl.cast(rule.scale, tl.float32)
    store_tokens(dk, first, end, dk_t * ALIGN, dk_low * scale, dk_high * scale, KEYS, D, D0, D1)
    store_tokens(dv, first, end, dv_t * ALIGN, dv_low, dv_high, KEYS, DV, V0, V1)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`.attention.attention`'s output with respect to q, k and v, each in its tensor's dtype.

    Args:
        grad_out, out: `(B, T, H, D_v)`. lse: `(B, H, T)` float32, natural log, a sink included. The sinks, which get no
            gradient, are read for float32 alone. The rest as in the forward pass.
    """
    problem = AttentionProblem(q, k, v, rule)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=problem.stored) for x in (q, k, v))
    lse = lse.contiguous()
    delta, unit_lse, mended = (torch.empty_like(lse) for _ in range(3))
    strides = {"lse_b": lse.stride(0), "lse_h": lse.stride(1)}
    problem.launch(
        "attention_dq", attention_dq_kernel, "rows", q.shape[2], {"o": out, "do": grad_out, "dq": dq},
        lse=lse, delta_out=delta, lse_out=unit_lse, mended_out=mended, **strides,
    )  # fmt: skip
    # Reads what the first has written of every row: delta, lse as it is used, and the factor that mends P.
    problem.launch(
        "attention_dkv", attention_dkv_kernel, "keys", k.shape[2], {"do": grad_out, "dk": dk, "dv": dv},
        lse=unit_lse, delta=delta, mended=mended, **strides,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

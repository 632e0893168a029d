"""Gradients of causal attention: A is computed again from the log-sum-exp, a tile at a time, in O(T) memory.

With ``P = exp(x - lse)``: ``dV = P^T dO``, ``dx = P (dO V^T - delta)``, ``delta = rowsum(dO O)``, times the softcap's
slope ``1 - (x / softcap)^2``; then ``dQ = scale dx K`` and ``dK = scale dx^T Q``. A sink is a column without a value:
it is in lse, and changes nothing else. There are two kernels, of ``3 T^2 D`` and ``4 T^2 D`` operations. The first
keeps a tile of rows and gives delta and dQ. The second keeps a tile of keys of one kv head, streams the rows of every
query head of its kv group, and gives dK and dV. The rounding of lse to float32 scales a whole row of P, an error that
shows beside float32 inputs: for those the first kernel also sums P and gives the factor that makes the sum 1 again.
Each output element has one owner and one order of summation: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule
from .launch import UNSPECIALIZED, AttentionLaunch
from .score import LOG2E, keys_seen, rule_of_head, sink_mass, visible, weight_and_slope
from .tokens import accumulate, at_head, load_lse, load_tokens, locate, products, store_tokens


@triton.jit
def dq_tile(
    dq_low, dq_high, mass, q_low, q_high, do_low, do_high, lse, delta, k, k_token, v, v_token, t, s0,
    keys_to, head_rule, rule, window_left, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
    SOME_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Add the part of one tile of keys to dQ, `[ROWS, D0]` and `[ROWS, D1]`, and, in nats, to the sum of P, `[ROWS]`.

    `SOME_HIDDEN`: some row does not see some key of the tile.
    """
    k_low, k_high = load_tokens(k, s0, keys_to, k_token, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
    v_low, v_high = load_tokens(v, s0, keys_to, v_token, KEYS, DV, V0, V1, UPCAST)  # [KEYS, V0], [KEYS, V1]
    product = products(q_low, q_high, k_low, k_high, D1)  # [ROWS, KEYS]
    distance = t[:, None] - (s0 + tl.arange(0, KEYS))[None, :]  # [ROWS, KEYS]
    p, slope = weight_and_slope(product, lse[:, None], distance, head_rule, rule, UNIT)  # [ROWS, KEYS]
    if SOME_HIDDEN:
        seen = visible(distance, window_left)  # [ROWS, KEYS]
        p = tl.where(seen, p, 0.0)
    if UNIT == 1.0:
        mass += tl.sum(p, 1)
    dx = p * (products(do_low, do_high, v_low, v_high, V1) - delta[:, None]) * slope  # [ROWS, KEYS]
    if SOME_HIDDEN:
        dx = tl.where(seen, dx, 0.0)  # 0 times what is not finite in V is NaN: keep it from rows that do not see V
    dq_low, dq_high = accumulate(dq_low, dq_high, dx, k_low, k_high, D1)
    return dq_low, dq_high, mass


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(
    q, k, v, o, do, dq, seqs, lse, delta_out, lse_out, mended_out,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, o_batch: tl.int64, o_token: tl.int64, o_head: tl.int64,
    do_batch: tl.int64, do_token: tl.int64, do_head: tl.int64, dq_batch: tl.int64, dq_token: tl.int64,
    dq_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64, tiles: tl.int32, n_heads: tl.int32,
    kv_group_size: tl.int32,
    rule, window_left,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, batch_row, start, end, _, tile, head = locate(seqs, tiles, n_heads, False)
    # Later rows have more keys: they go first, so that the last programs to run are short.
    first = start + (tiles - 1 - tile) * ROWS
    if first >= end:
        return
    t = first + tl.arange(0, ROWS)  # [ROWS]
    keys_from, keys_to = keys_seen(start, end, first, window_left, ROWS)

    head_rule = rule_of_head(rule, sequence, head)
    q = at_head(q, batch_row, head, q_batch, q_head, ALIGN)
    k = at_head(k, batch_row, head, k_batch, k_head, ALIGN, kv_group_size)
    v = at_head(v, batch_row, head, v_batch, v_head, ALIGN, kv_group_size)
    o = at_head(o, batch_row, head, o_batch, o_head, ALIGN)
    do = at_head(do, batch_row, head, do_batch, do_head, ALIGN)
    dq = at_head(dq, batch_row, head, dq_batch, dq_head, ALIGN)
    of_head = batch_row * lse_batch + tl.cast(head, tl.int64) * lse_head  # where the head begins in lse, delta, mended
    do_low, do_high = load_tokens(do, first, end, do_token * ALIGN, ROWS, DV, V0, V1, UPCAST)  # [ROWS, V0], [ROWS, V1]
    o_low, o_high = load_tokens(o, first, end, o_token * ALIGN, ROWS, DV, V0, V1, UPCAST)  # [ROWS, V0], [ROWS, V1]
    delta = tl.sum(do_low.to(tl.float32) * o_low.to(tl.float32), 1)  # [ROWS]
    if V1 > 0:
        delta += tl.sum(do_high.to(tl.float32) * o_high.to(tl.float32), 1)
    tl.store(delta_out + of_head + t, delta, mask=t < end)
    # In bits, scaling and subtraction are one FMA; in nats less is rounded, which shows beside float32 inputs.
    UNIT: tl.constexpr = 1.0 if do_low.dtype == tl.float32 else LOG2E
    row_lse = load_lse(lse + of_head, first, end, 1, ROWS)  # [ROWS]
    row_lse *= UNIT
    tl.store(lse_out + of_head + t, row_lse, mask=t < end)
    q_low, q_high = load_tokens(q, first, end, q_token * ALIGN, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]

    dq_low = tl.zeros([ROWS, D0], tl.float32)
    dq_high = tl.zeros([ROWS, D1 if D1 > 0 else 16], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    whole_to = keys_from + (first + 1 - keys_from) // KEYS * KEYS
    whole_from = keys_from
    if window_left is not None:
        # Keys that the sliding window hides from the later rows of the tile.
        hidden = tl.maximum(first + ROWS - 1 - window_left - keys_from, 0)
        whole_from = tl.minimum(keys_from + tl.cdiv(hidden, KEYS) * KEYS, whole_to)
    # Tiles with keys that the sliding window hides from some row; whole tiles; tiles with keys later than some row.
    bounds = (keys_from, whole_from, whole_to, keys_to)
    for part in tl.static_range(0 if window_left is not None else 1, 3):
        for s0 in range(bounds[part], bounds[part + 1], KEYS):
            dq_low, dq_high, mass = dq_tile(
                dq_low, dq_high, mass, q_low, q_high, do_low, do_high, row_lse, delta, k, k_token * ALIGN, v,
                v_token * ALIGN, t, s0, keys_to, head_rule, rule, window_left, D, D0, D1, DV, V0, V1, UPCAST, KEYS,
                UNIT, part != 1,
            )  # fmt: skip
    factor = tl.cast(rule.scale, tl.float32) + tl.zeros_like(delta)  # [ROWS]
    if UNIT == 1.0:
        if rule.sinks is not None:
            mass += sink_mass(head_rule, rule, row_lse)
        mended = tl.where(mass > 0, 1.0 / mass, 0.0)  # [ROWS]
        tl.store(mended_out + of_head + t, mended, mask=t < end)
        factor *= mended
    store_tokens(dq, first, end, dq_token * ALIGN, dq_low * factor[:, None], dq_high * factor[:, None], ROWS, D, D0, D1)


@triton.jit
def dkv_tile(
    dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q, q_token, do, do_token, lse, delta, mended,
    s, t0, rows_to, head_rule, rule, window_left, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    SOME_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Add the part of one tile of rows of one query head to dK and dV, `[KEYS, D0]`, `[KEYS, D1]`, `[KEYS, V0]`,
    `[KEYS, V1]`. `lse`, `delta` and `mended` point to where the head's begin."""
    UNIT: tl.constexpr = 1.0 if k_low.dtype == tl.float32 else LOG2E
    local = tl.arange(0, ROWS)  # [ROWS]
    q_low, q_high = load_tokens(q, t0, rows_to, q_token, ROWS, D, D0, D1, UPCAST)  # [ROWS, D0], [ROWS, D1]
    do_low, do_high = load_tokens(do, t0, rows_to, do_token, ROWS, DV, V0, V1, UPCAST)  # [ROWS, V0], [ROWS, V1]
    row_lse = load_lse(lse, t0, rows_to, 1, ROWS)  # [ROWS]
    row_delta = tl.load(delta + t0 + local, mask=t0 + local < rows_to, other=0.0)  # [ROWS]
    product = products(k_low, k_high, q_low, q_high, D1)  # [KEYS, ROWS]
    distance = (t0 + local)[None, :] - s[:, None]  # [KEYS, ROWS]
    p, slope = weight_and_slope(product, row_lse[None, :], distance, head_rule, rule, UNIT)  # [KEYS, ROWS]
    if UNIT == 1.0:
        p *= tl.load(mended + t0 + local, mask=t0 + local < rows_to, other=0.0)[None, :]
    if SOME_HIDDEN:
        seen = visible(distance, window_left)  # [KEYS, ROWS]
        p = tl.where(seen, p, 0.0)
    dv_low, dv_high = accumulate(dv_low, dv_high, p, do_low, do_high, V1)
    dx = p * (products(v_low, v_high, do_low, do_high, V1) - row_delta[None, :]) * slope  # [KEYS, ROWS]
    if SOME_HIDDEN:
        dx = tl.where(seen, dx, 0.0)
    dk_low, dk_high = accumulate(dk_low, dk_high, dx, q_low, q_high, D1)
    return dk_low, dk_high, dv_low, dv_high


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkv_kernel(
    q, k, v, do, dk, dv, seqs, lse, delta, mended,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, do_batch: tl.int64, do_token: tl.int64, do_head: tl.int64,
    dk_batch: tl.int64, dk_token: tl.int64, dk_head: tl.int64, dv_batch: tl.int64, dv_token: tl.int64,
    dv_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64, tiles: tl.int32, n_kv_heads: tl.int32,
    kv_group_size: tl.int32,
    rule, window_left,
    ALIGN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Tiles of keys run in order: earlier keys have more rows, so that the last programs to run are short.
    sequence, batch_row, start, end, _, tile, kv_head = locate(seqs, tiles, n_kv_heads, False)
    first = start + tile * KEYS
    if first >= end:
        return
    s = first + tl.arange(0, KEYS)  # [KEYS]
    # In tiles of rows from `whole_from` to `whole_to` every row sees every key. Before, some keys are later than some
    # row; after, the sliding window hides some.
    whole_from = first + tl.cdiv(KEYS - 1, ROWS) * ROWS
    rows_to = end
    whole_to = end
    if window_left is not None:
        rows_to = tl.minimum(end, first + KEYS + window_left)
        whole_to = whole_from + tl.maximum(first + window_left + 1 - whole_from, 0) // ROWS * ROWS

    bounds = (first, whole_from, whole_to, rows_to)

    k = at_head(k, batch_row, kv_head, k_batch, k_head, ALIGN)
    v = at_head(v, batch_row, kv_head, v_batch, v_head, ALIGN)
    dk = at_head(dk, batch_row, kv_head, dk_batch, dk_head, ALIGN)
    dv = at_head(dv, batch_row, kv_head, dv_batch, dv_head, ALIGN)
    k_low, k_high = load_tokens(k, first, end, k_token * ALIGN, KEYS, D, D0, D1, UPCAST)  # [KEYS, D0], [KEYS, D1]
    v_low, v_high = load_tokens(v, first, end, v_token * ALIGN, KEYS, DV, V0, V1, UPCAST)  # [KEYS, V0], [KEYS, V1]
    q += batch_row * q_batch * ALIGN
    do += batch_row * do_batch * ALIGN
    dk_low = tl.zeros([KEYS, D0], tl.float32)
    dk_high = tl.zeros([KEYS, D1 if D1 > 0 else 16], tl.float32)
    dv_low = tl.zeros([KEYS, V0], tl.float32)
    dv_high = tl.zeros([KEYS, V1 if V1 > 0 else 16], tl.float32)
    for head in range(kv_head * kv_group_size, (kv_head + 1) * kv_group_size):
        head_rule = rule_of_head(rule, sequence, head)
        q_of_head = q + tl.cast(head, tl.int64) * q_head * ALIGN
        do_of_head = do + tl.cast(head, tl.int64) * do_head * ALIGN
        of_head = batch_row * lse_batch + tl.cast(head, tl.int64) * lse_head
        for part in tl.static_range(3 if window_left is not None else 2):
            for t0 in range(bounds[part], tl.minimum(bounds[part + 1], rows_to), ROWS):
                dk_low, dk_high, dv_low, dv_high = dkv_tile(
                    dk_low, dk_high, dv_low, dv_high, k_low, k_high, v_low, v_high, q_of_head, q_token * ALIGN,
                    do_of_head, do_token * ALIGN, lse + of_head, delta + of_head, mended + of_head, s, t0, rows_to,
                    head_rule, rule, window_left, D, D0, D1, DV, V0, V1, UPCAST, ROWS, part != 1,
                )  # fmt: skip
    scale = tl.cast(rule.scale, tl.float32)
    store_tokens(dk, first, end, dk_token * ALIGN, dk_low * scale, dk_high * scale, KEYS, D, D0, D1)
    store_tokens(dv, first, end, dv_token * ALIGN, dv_low, dv_high, KEYS, DV, V0, V1)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`.attention.attention`'s output with respect to q, k and v, each in its tensor's dtype.

    Args:
        grad_out, out: `(B, T, H, D_v)`. lse: `(B, H, T)` float32, natural log, a sink included. The sinks, which get no
            gradient, are read with float32 inputs alone. The rest as in the forward pass.
    """
    launch = AttentionLaunch(q, k, v, rule)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=launch.stored) for x in (q, k, v))
    lse = lse.contiguous()
    delta, unit_lse, mended = (torch.empty_like(lse) for _ in range(3))
    strides = {"lse_batch": lse.stride(0), "lse_head": lse.stride(1)}
    launch.run(
        "attention_dq", attention_dq_kernel, "rows", q.shape[2], {"o": out, "do": grad_out, "dq": dq},
        n_heads=q.shape[2], lse=lse, delta_out=delta, lse_out=unit_lse, mended_out=mended, **strides,
    )  # fmt: skip
    # Reads what the first has written of every row: delta, lse in its unit, and the factor that makes P sum to 1.
    launch.run(
        "attention_dkv", attention_dkv_kernel, "keys", k.shape[2], {"do": grad_out, "dk": dk, "dv": dv},
        n_kv_heads=k.shape[2], lse=unit_lse, delta=delta, mended=mended, **strides,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

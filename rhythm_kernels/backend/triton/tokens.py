"""Whose turn it is and what it reads: the sequence and head of a program, tiles of tokens, and their products.

Nothing here knows the score rule, which is :mod:`.score`. Products of 16-bit inputs are accumulated in float32;
operands of float32 dots say ``input_precision="ieee"``, since TF32 would lose the 1e-4 that the measures promise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(seqs, tiles, n_heads, HEADS_FIRST: tl.constexpr):
    """Which work a program has: its sequence, by number and as `(row, start, end, response_start)`, its tile and its
    place among heads.

    What varies fastest is what neighbouring programs, which run at the same time, share in the cache: where a program
    streams a whole sequence, tiles, which then read the same tokens of one head; in a band, heads (`HEADS_FIRST`),
    whose kv head is the same, and whose tokens lie side by side in memory. Everything sits on grid x: y and z end at
    65,535.
    """
    pid = tl.program_id(0)
    if HEADS_FIRST:
        head = pid % n_heads
        tile = pid // n_heads % tiles
    else:
        tile = pid % tiles
        head = pid // tiles % n_heads
    sequence = pid // n_heads // tiles
    entry = seqs + sequence.to(tl.int64) * 4
    row = tl.load(entry).to(tl.int64)
    return sequence, row, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tile, head


@triton.jit
def at_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN: tl.constexpr):
    """Of the `listed`-th entry of the head table: the query head, where it has its queries and its keys in a row of
    the batch, and its row of lse."""
    head = tl.load(heads + 2 * listed)
    q += row * q_b * ALIGN + tl.cast(head, tl.int64) * q_h * ALIGN
    k += row * k_b * ALIGN + tl.cast(head // kv_group, tl.int64) * k_h * ALIGN
    return head, q, k, tl.load(heads + 2 * listed + 1).to(tl.int64)


@triton.jit
def listed_at(heads, n_heads, head):
    """The row of the head table that names `head`; -1 where none does."""
    found = -1
    for i in range(0, n_heads, 32):
        entry = i + tl.arange(0, 32)
        named = tl.load(heads + 2 * entry, mask=entry < n_heads, other=-1) == head
        found = tl.maximum(found, tl.max(tl.where(named, entry, -1), 0))
    return found


@triton.jit
def load_tokens(base, first, end, stride, BLOCK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                D1: tl.constexpr, UPCAST: tl.constexpr, BOUNDED: tl.constexpr = True):  # fmt: skip
    """Tokens `first .. first + BLOCK` of one head, zero from `end` on, as two chunks `(BLOCK, D0)`, `(BLOCK, D1)`.

    Two powers of two cover 80, 96 or 192 without padding; where one is enough (`D1 == 0`) it is returned twice.
    Offsets are 64-bit: a packed batch seen through the strides of a fused projection passes 2^31 elements early.
    Without `BOUNDED` the caller knows that all of them are before `end`, and each copy is spared its comparison.
    """
    local = tl.arange(0, BLOCK)
    live = (first + local < end)[:, None] if BOUNDED else tl.full([BLOCK, 1], True, tl.int1)
    rows = base + tl.cast(first, tl.int64) * stride + (local.to(tl.int64) * stride)[:, None]
    d = tl.arange(0, D0)[None, :]
    if D0 > D:
        low = tl.load(rows + d, mask=live & (d < D), other=0.0)
    else:
        low = tl.load(rows + d, mask=live, other=0.0)
    if UPCAST:
        low = low.to(tl.float32)
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]
        if D0 + D1 > D:
            high = tl.load(rows + e, mask=live & (e < D), other=0.0)
        else:
            high = tl.load(rows + e, mask=live, other=0.0)
        if UPCAST:
            high = high.to(tl.float32)
    else:
        high = low
    return low, high


@triton.jit
def store_tokens(base, first, end, stride, low, high, BLOCK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                 D1: tl.constexpr):  # fmt: skip
    """Write tokens `first .. first + BLOCK` of one head up to `end`, from the chunks that :func:`load_tokens` makes."""
    local = tl.arange(0, BLOCK)
    live = (first + local < end)[:, None]
    rows = base + tl.cast(first, tl.int64) * stride + (local.to(tl.int64) * stride)[:, None]
    d = tl.arange(0, D0)[None, :]
    tl.store(rows + d, low, mask=live & (d < D) if D0 > D else live)
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]
        tl.store(rows + e, high, mask=live & (e < D) if D0 + D1 > D else live)


@triton.jit
def load_lse(base, first, end, stride, BLOCK: tl.constexpr):
    """The log-sum-exp of rows `first .. first + BLOCK` of one head; from `end` on so large that A is 0 there.

    (Not infinite: an infinite one is a caller's, and becomes NaN by :func:`known`.)

    The offsets within the tile are the same for every tile: outside of a loop over tiles but for one scalar.
    """
    local = tl.arange(0, BLOCK)
    rows = base + tl.cast(first, tl.int64) * stride + local.to(tl.int64) * stride
    return tl.load(rows, mask=first + local < end, other=1e38)


@triton.jit
def products(a_low, a_high, b_low, b_high, D1: tl.constexpr):
    """`a . b` for every pair of tokens, `(rows of a, rows of b)` float32."""
    acc = tl.dot(a_low, tl.trans(b_low), input_precision="ieee")
    if D1 > 0:
        acc = tl.dot(a_high, tl.trans(b_high), acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate(low, high, weights, b_low, b_high, D1: tl.constexpr):
    """Add `weights . b` to the two chunks of a sum over tokens; weights are rounded to b's precision, as is usual."""
    weights = weights.to(b_low.dtype)
    low = tl.dot(weights, b_low, low, input_precision="ieee")
    if D1 > 0:
        high = tl.dot(weights, b_high, high, input_precision="ieee")
    return low, high

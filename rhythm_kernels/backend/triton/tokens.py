"""Which work a program has and what it reads: its sequence and head, tiles of tokens, and their products.

Nothing here knows the score rule, which is :mod:`.score`. A *tile* is a block of rows by a block of keys; a *chunk* is
a power-of-two part of a head, of which a head has one or two. Products of 16-bit inputs are accumulated in float32;
operands of float32 dots say ``input_precision="ieee"``, since TF32 would lose the 1e-4 that the measures promise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(seqs, tiles, n_heads, HEADS_FIRST: tl.constexpr):
    """The work of this program: its sequence, by number and as `(batch_row, start, end, response_start)`, its tile, and
    its place among `n_heads` heads.

    What varies fastest over programs is what neighbours, which run at the same time, share in the cache. Where a
    program streams a whole sequence that is the tile: neighbours read the same tokens of one head. In a band it is the
    head (`HEADS_FIRST`): heads of one kv group read the same keys, and heads lie side by side in memory. Everything is
    on grid x, because y and z end at 65,535.
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
    batch_row = tl.load(entry).to(tl.int64)
    return sequence, batch_row, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tile, head


@triton.jit
def at_head(x, batch_row, head, x_batch, x_head, ALIGN: tl.constexpr, kv_group_size=1):
    """Where one head of one batch row begins in `x`; with `kv_group_size`, the kv head that so many query heads share.

    The strides come divided by ALIGN.
    """
    return x + (batch_row * x_batch * ALIGN + tl.cast(head // kv_group_size, tl.int64) * x_head * ALIGN)


@triton.jit
def listed_head(q, q_batch, q_head, k, k_batch, k_head, batch_row, heads, entry, kv_group_size, ALIGN: tl.constexpr):
    """Of an entry of the head table: the query head, where its queries and its keys begin, and its lse index."""
    head = tl.load(heads + 2 * entry)
    q = at_head(q, batch_row, head, q_batch, q_head, ALIGN)
    k = at_head(k, batch_row, head, k_batch, k_head, ALIGN, kv_group_size)
    return head, q, k, tl.load(heads + 2 * entry + 1).to(tl.int64)


@triton.jit
def entry_of(heads, n_selected, head):
    """The entry of the head table that names `head`; -1 where none does."""
    found = -1
    for i in range(0, n_selected, 32):
        entry = i + tl.arange(0, 32)  # [32]
        named = tl.load(heads + 2 * entry, mask=entry < n_selected, other=-1) == head  # [32]
        found = tl.maximum(found, tl.max(tl.where(named, entry, -1), 0))
    return found


@triton.jit
def load_tokens(base, first, end, stride, BLOCK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                D1: tl.constexpr, UPCAST: tl.constexpr, BOUNDED: tl.constexpr = True):  # fmt: skip
    """Tokens `first .. first + BLOCK` of one head, zero from `end` on, as two chunks `[BLOCK, D0]`, `[BLOCK, D1]`.

    Two powers of two cover 80, 96 or 192 without padding; where one is enough (`D1 == 0`) it is returned twice.
    Offsets are 64-bit: a packed batch seen through the strides of a fused projection passes 2^31 elements early.
    Without `BOUNDED` the caller knows that all of them are before `end`, and each copy is spared its comparison.
    """
    local = tl.arange(0, BLOCK)  # [BLOCK]
    live = (first + local < end)[:, None] if BOUNDED else tl.full([BLOCK, 1], True, tl.int1)  # [BLOCK, 1]
    tokens = base + tl.cast(first, tl.int64) * stride + (local.to(tl.int64) * stride)[:, None]  # [BLOCK, 1]
    d = tl.arange(0, D0)[None, :]  # [1, D0]
    if D0 > D:
        low = tl.load(tokens + d, mask=live & (d < D), other=0.0)  # [BLOCK, D0]
    else:
        low = tl.load(tokens + d, mask=live, other=0.0)  # [BLOCK, D0]
    if UPCAST:
        low = low.to(tl.float32)
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]  # [1, D1]
        if D0 + D1 > D:
            high = tl.load(tokens + e, mask=live & (e < D), other=0.0)  # [BLOCK, D1]
        else:
            high = tl.load(tokens + e, mask=live, other=0.0)  # [BLOCK, D1]
        if UPCAST:
            high = high.to(tl.float32)
    else:
        high = low
    return low, high


@triton.jit
def store_tokens(base, first, end, stride, low, high, BLOCK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
                 D1: tl.constexpr):  # fmt: skip
    """Write tokens `first .. first + BLOCK` of one head up to `end`, from the chunks that :func:`load_tokens` makes."""
    local = tl.arange(0, BLOCK)  # [BLOCK]
    live = (first + local < end)[:, None]  # [BLOCK, 1]
    tokens = base + tl.cast(first, tl.int64) * stride + (local.to(tl.int64) * stride)[:, None]  # [BLOCK, 1]
    d = tl.arange(0, D0)[None, :]  # [1, D0]
    tl.store(tokens + d, low, mask=live & (d < D) if D0 > D else live)
    if D1 > 0:
        e = D0 + tl.arange(0, D1)[None, :]  # [1, D1]
        tl.store(tokens + e, high, mask=live & (e < D) if D0 + D1 > D else live)


@triton.jit
def load_lse(base, first, end, stride, BLOCK: tl.constexpr):
    """The log-sum-exp `[BLOCK]` of rows `first .. first + BLOCK` of one head; from `end` on so large that A is 0 there.

    (Not infinite: an infinite one is a caller's, and becomes NaN by :func:`known`.)

    Only one scalar changes from tile to tile, so that the compiler computes the other offsets before the loop.
    """
    local = tl.arange(0, BLOCK)  # [BLOCK]
    rows = base + tl.cast(first, tl.int64) * stride + local.to(tl.int64) * stride  # [BLOCK]
    return tl.load(rows, mask=first + local < end, other=1e38)


@triton.jit
def products(a_low, a_high, b_low, b_high, D1: tl.constexpr):
    """`a . b` for every pair of tokens, `[tokens of a, tokens of b]` float32."""
    acc = tl.dot(a_low, tl.trans(b_low), input_precision="ieee")
    if D1 > 0:
        acc = tl.dot(a_high, tl.trans(b_high), acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate(low, high, weights, b_low, b_high, D1: tl.constexpr):
    """Add `weights . b`, of `weights [A, B]` and `b [B, D]`, to the two chunks of a sum `[A, D]`.

    The weights are rounded to b's dtype first, as attention kernels do.
    """
    weights = weights.to(b_low.dtype)
    low = tl.dot(weights, b_low, low, input_precision="ieee")
    if D1 > 0:
        high = tl.dot(weights, b_high, high, input_precision="ieee")
    return low, high

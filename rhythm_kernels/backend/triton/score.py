"""The score rule and the tile loads of every Triton pass.

A new attention variant is one change here: :func:`logit` says what the model's softmax is taken of, :func:`visible`
which keys a row sees, :func:`sink_mass` what a sink takes from it.

Numerics: float32 throughout, products of 16-bit inputs accumulated in float32. Operands of float32 dots say
``input_precision="ieee"``, since TF32 would lose the 1e-4 that the measures promise.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(seqs, tiles, n_heads, HEADS_FIRST: tl.constexpr):
    """Which work a program has: its sequence `(row, start, end, response_start)`, its tile and its place among heads.

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
    entry = seqs + (pid // n_heads // tiles).to(tl.int64) * 4
    row = tl.load(entry).to(tl.int64)
    return row, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tile, head


@triton.jit
def of_head(q, q_b, q_h, k, k_b, k_h, row, heads, listed, kv_group, ALIGN: tl.constexpr):
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
def nothing(sinks, head):
    """0; NaN where the sink of this head is `+inf` or NaN, beside which no key has a share. One of `-inf` is none."""
    if sinks is None:
        return 0.0
    else:
        sink = tl.load(sinks + head)
        return 0.0 * tl.where(sink == float("-inf"), 0.0, sink)


@triton.jit
def known(lse, zero):
    """A log-sum-exp as it was given; NaN where it is not finite, or `zero`, of :func:`nothing`, is NaN: one FMA."""
    return lse + lse * zero


@triton.jit
def in_bits(lse, to_bits, to_bits_rest):
    """A log-sum-exp in the bits that :func:`weight_in_bits` wants: times a ratio that comes in two parts."""
    return lse * tl.cast(to_bits, tl.float32) + lse * tl.cast(to_bits_rest, tl.float32)


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


@triton.jit
def tanh(x):
    """`tanh` to 1e-7 relative: a polynomial near 0, where `1 - exp(-2|x|)` cancels; no overflow anywhere."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def logit(product, scale, softcap, UNIT: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """`x = scale q.k`, capped to `softcap tanh(x / softcap)`; in units of `1 / UNIT` nats (LOG2E: bits)."""
    scale = tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        softcap = tl.cast(softcap, tl.float32)
        return (softcap * UNIT) * tanh(product * (scale / softcap))
    return product * (scale * UNIT)


@triton.jit
def visible(distance, window_left, HAS_WINDOW: tl.constexpr):
    """Whether row t sees key s, `distance = t - s`: causal, and at most `window_left` back."""
    seen = distance >= 0
    if HAS_WINDOW:
        seen = seen & (distance <= window_left)
    return seen


@triton.jit
def weight(x, lse, UNIT: tl.constexpr):
    """`A = exp(x - lse)`, both in units of `1 / UNIT` nats.

    A known lse comes in nats (`UNIT` 1), and the difference is taken there: scaling both to bits first would round
    each at its size.
    """
    return tl.exp2((x - lse) * (LOG2E / UNIT))


@triton.jit
def weight_in_bits(product, lse_bits, scale, softcap, bits, HAS_SOFTCAP: tl.constexpr):
    """`A = exp(x - lse)` from a product and lse :func:`in_bits`: one FMA under the exponential.

    `bits` is the last factor of x, softcap or scale, in bits and rounded. lse went to bits by exactly `bits` over that
    factor: the two roundings are then the same one, and scale the difference `x - lse` alone, not each at its size.
    """
    if HAS_SOFTCAP:
        product = tanh(product * (tl.cast(scale, tl.float32) / tl.cast(softcap, tl.float32)))
    return tl.exp2(product * tl.cast(bits, tl.float32) - lse_bits)


@triton.jit
def band_sum(q_low, q_high, k_head, k_stride, t, keys_from, keys_to, lse, scale, softcap, window_left, window,
             D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
             HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """`sum over s visible, t - W < s <= t, of exp(x - lse) (W - (t - s))`: what WAAD lacks of `W rowsum`."""
    band = tl.zeros_like(lse)
    width = window
    if HAS_WINDOW:
        width = tl.minimum(window, window_left + 1)
    width = tl.cast(width, tl.uint32)
    for s0 in range(keys_from, keys_to, KEYS):
        k_low, k_high = load_tokens(k_head, s0, keys_to, k_stride, KEYS, D, D0, D1, UPCAST)
        x = logit(products(q_low, q_high, k_low, k_high, D1), scale, softcap, UNIT, HAS_SOFTCAP)
        # W - (t - s) as a row's part and a column's: exact, as both are below 2^24.
        column = tl.arange(0, KEYS)
        from_s0 = t - s0
        # One unsigned comparison for both ends: a negative distance is a large one.
        near = (from_s0[:, None] - column[None, :]).to(tl.uint32) < width
        a = tl.where(near, weight(x, lse[:, None], UNIT), 0.0)
        band += tl.sum(a * ((window - from_s0).to(tl.float32)[:, None] + column.to(tl.float32)[None, :]), 1)
    return band


@triton.jit
def sink_mass(sinks, head, lse):
    """What the sink of this head takes of a row: `exp(sink - lse)`, `lse` having the sink in it; 0 without sinks."""
    if sinks is None:
        return 0.0 * lse
    else:
        return tl.exp2((tl.load(sinks + head) - lse) * LOG2E)


@triton.jit
def clamp_waad(value, window):
    """WAAD into [0, W] against rounding; NaN fails both comparisons and stays."""
    value = tl.where(value < 0.0, 0.0, value)
    return tl.where(value > window, window, value)

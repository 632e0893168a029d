"""The score rule of every Triton pass, forward and backward: a new attention variant is added in this file.

A kernel takes the rule as one argument, calls :func:`rule_of_head` once for the sink and slope of its head, and passes
both on, with the distance ``t - s`` of every pair. :func:`logit` is what the model's softmax is taken of,
:func:`weight_and_slope` gives A and the logit's slope, :func:`visible` and :func:`keys_seen` which keys a row sees,
:func:`sink_mass` what a sink takes from it. :func:`absorb_peak` and :func:`weight_in_bits` are faster forms of the same
where the rule allows one.

Numerics: float32 throughout. `UNIT` is the unit of a logit: 1 for nats, LOG2E for bits, of which a nat has LOG2E.
Shapes: x, distance and products are tiles, `[ROWS, KEYS]` or `[KEYS, ROWS]` as the kernel has them.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...rule import Rule

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class ScoreRule(NamedTuple):
    """The rule as one kernel argument. Kernels are compiled without the parts that are None.

    It holds no integers: Triton compiles a kernel again where one in a tuple is 1 or a multiple of 16. (A tensor that
    begins at a multiple of 16 bytes, and one that does not, make two kernels as well.)
    """

    scale: float
    softcap: float | None
    sinks: Tensor | None  # (H,) float32
    slopes: Tensor | None  # (1, H) or (S, H) float32
    slopes_seq: float  # stride from the slopes of one sequence to those of the next: 0 or H
    rising: tl.constexpr  # whether logits rise with products
    bits: float  # the last factor of a logit, softcap or scale, over ln 2, rounded to float32
    to_bits: float  # with to_bits_rest the exact ratio of `bits` to the factor, in two float32 parts
    to_bits_rest: float


def score_rule(rule: Rule) -> ScoreRule:
    """The rule as kernels take it."""
    softcap = float(rule.softcap) if rule.softcap > 0 else None
    factor = rule.scale if softcap is None else softcap
    bits = ctypes.c_float(factor / math.log(2)).value
    # Below float32's normal numbers the rounding is coarse, and logits are 0 to within it: the plain ratio serves lse.
    normal = math.isfinite(bits) and abs(bits) >= 2.0**-126
    ratio = bits / factor if normal else 1 / math.log(2)
    to_bits = ctypes.c_float(ratio).value
    rising = tl.constexpr(rule.scale > 0)
    slopes = rule.alibi_slopes
    slopes_seq = 0.0 if slopes is None or len(slopes) == 1 else float(slopes.stride(0))
    return ScoreRule(
        float(rule.scale), softcap, rule.sinks, slopes, slopes_seq, rising, bits, to_bits, ratio - to_bits
    )  # fmt: skip


class HeadRule(NamedTuple):
    """The rule's parts for one query head of one sequence, each 0 where the rule is without it."""

    sink: Any  # a pointer to the sink
    slope: Any  # of ALiBi


@triton.jit
def rule_of_head(rule, sequence, head):
    """The :class:`HeadRule` of one query head in one entry of the sequence table."""
    sink = 0
    if rule.sinks is not None:
        sink = rule.sinks + head
    slope = 0.0
    if rule.slopes is not None:
        slope = tl.load(rule.slopes + tl.cast(sequence, tl.int64) * tl.cast(rule.slopes_seq, tl.int64) + head)
    return HeadRule(sink, slope)


@triton.jit
def tanh(x):
    """`tanh` to 1e-7 relative: a polynomial near 0, where `1 - exp(-2|x|)` cancels; no overflow anywhere."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(product, rule, UNIT: tl.constexpr):
    """`scale q.k`, capped to `softcap tanh(scale q.k / softcap)`."""
    scale = tl.cast(rule.scale, tl.float32)
    if rule.softcap is not None:
        softcap = tl.cast(rule.softcap, tl.float32)
        return (softcap * UNIT) * tanh(product * (scale / softcap))
    return product * (scale * UNIT)


@triton.jit
def biased(x, distance, head_rule, rule, UNIT: tl.constexpr):
    """A capped score `x` less ALiBi's `slope (t - s)`."""
    if rule.slopes is not None:
        return x - (head_rule.slope * UNIT) * distance.to(tl.float32)
    return x


@triton.jit
def logit(product, distance, head_rule, rule, UNIT: tl.constexpr):
    """`x = softcap(scale q.k) - slope (t - s)`; `head_rule` is that of :func:`rule_of_head`."""
    return biased(capped(product, rule, UNIT), distance, head_rule, rule, UNIT)


@triton.jit
def visible(distance, window_left):
    """Whether row t sees key s, `distance = t - s`: causal, and at most `window_left` back, where that is not None."""
    seen = distance >= 0
    if window_left is not None:
        seen = seen & (distance <= window_left)
    return seen


@triton.jit
def keys_seen(start, end, first, window_left, ROWS: tl.constexpr):
    """The range `(keys_from, keys_to)` that holds every key that a row of the tile `first .. first + ROWS` sees."""
    keys_from = start
    if window_left is not None:
        keys_from = tl.maximum(start, first - window_left)
    return keys_from, tl.minimum(end, first + ROWS)


@triton.jit
def absorb_peak(peak, product, distance, head_rule, rule, window_left, SOME_HIDDEN: tl.constexpr):
    """Take a tile of products `[ROWS, KEYS]` into the running maximum `peak [ROWS]`, in bits.

    Returns the new maximum `[ROWS]`, `exp(x - maximum)` `[ROWS, KEYS]`, 0 where hidden, and `exp(old maximum - new)`
    `[ROWS]`, by which sums relative to the old maximum are multiplied.
    """
    if SOME_HIDDEN or rule.softcap is not None or rule.slopes is not None or not rule.rising:
        x = logit(product, distance, head_rule, rule, LOG2E)  # [ROWS, KEYS]
        if SOME_HIDDEN:
            x = tl.where(visible(distance, window_left), x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 1))  # [ROWS]
        base = new_peak
        if SOME_HIDDEN:
            # A row that has seen no key yet subtracts 0, not -inf. Its peak stays -inf: its logits may lie far below 0.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(x - base[:, None])  # [ROWS, KEYS]
    else:
        # The largest product is the largest logit: scaling and subtraction become one FMA.
        bits = tl.cast(rule.scale, tl.float32) * LOG2E
        new_peak = tl.maximum(peak, tl.max(product, 1) * bits)  # [ROWS]
        base = new_peak
        p = tl.exp2(product * bits - base[:, None])  # [ROWS, KEYS]
    return new_peak, p, tl.exp2(peak - base)


@triton.jit
def weight(x, lse, UNIT: tl.constexpr):
    """`A = exp(x - lse)`, both in units of `1 / UNIT` nats.

    A known lse comes in nats (`UNIT` 1), and is subtracted in nats: both are much larger than their difference, so
    that scaling each to bits first would round at their size, not at that of the difference.
    """
    return tl.exp2((x - lse) * (LOG2E / UNIT))


@triton.jit
def weight_and_slope(product, lse, distance, head_rule, rule, UNIT: tl.constexpr):
    """`A` and the slope of the logit, `dx / d(scale q.k)`; `lse`, in `1 / UNIT` nats, is broadcast to `product`."""
    x = capped(product, rule, UNIT)
    a = weight(biased(x, distance, head_rule, rule, UNIT), lse, UNIT)
    if rule.softcap is not None:
        capped_tanh = x * (1.0 / (tl.cast(rule.softcap, tl.float32) * UNIT))
        return a, 1.0 - capped_tanh * capped_tanh
    else:
        return a, 1.0


@triton.jit
def in_bits(lse, rule):
    """A log-sum-exp `[ROWS]` in the unit of :func:`weight_in_bits`: bits, by a ratio in two float32 parts.

    With ALiBi it stays in nats.
    """
    if rule.slopes is not None:
        return lse
    return lse * tl.cast(rule.to_bits, tl.float32) + lse * tl.cast(rule.to_bits_rest, tl.float32)


@triton.jit
def weight_in_bits(product, lse_bits, distance, head_rule, rule):
    """`A = exp(x - lse)` from a product and lse :func:`in_bits`: one FMA under the exponential.

    Let c be the last factor of x, softcap or scale, and `rule.bits` its value in bits, c / ln 2, rounded. lse has been
    multiplied by `rule.bits / c`, the factor that x gets too: the rounding scales the difference `x - lse`, which is
    small, in place of x and lse each at its own size.
    """
    if rule.slopes is not None:
        # For keys with a share worth counting, lse and the bias nearly cancel: they are added before all else.
        return weight(capped(product, rule, 1.0), head_rule.slope * distance.to(tl.float32) + lse_bits, 1.0)
    if rule.softcap is not None:
        product = tanh(product * (tl.cast(rule.scale, tl.float32) / tl.cast(rule.softcap, tl.float32)))
    return tl.exp2(product * tl.cast(rule.bits, tl.float32) - lse_bits)


@triton.jit
def nothing(head_rule, rule):
    """0; NaN where the sink of this head is `+inf` or NaN, beside which A is undefined. A sink of `-inf` is no sink."""
    if rule.sinks is None:
        return 0.0
    else:
        sink = tl.load(head_rule.sink)
        return 0.0 * tl.where(sink == float("-inf"), 0.0, sink)


@triton.jit
def known(lse, zero):
    """A given log-sum-exp `[ROWS]`, made NaN where it is not finite or `zero` (:func:`nothing`) is NaN, in one FMA."""
    return lse + lse * zero


@triton.jit
def sink_mass(head_rule, rule, lse):
    """What the sink of this head takes of each row: `exp(sink - lse)`, `lse` including the sink; 0 without sinks."""
    if rule.sinks is None:
        return 0.0 * lse
    else:
        return weight(tl.load(head_rule.sink), lse, 1.0)


@triton.jit
def absorb_sink(peak, head_rule):
    """Take the sink into the running maximum `peak [ROWS]`, in bits: the new maximum, the mass of the sink relative to
    it, and `exp(old maximum - new)`, each `[ROWS]`."""
    sink = tl.load(head_rule.sink) * LOG2E
    top = tl.maximum(peak, sink)  # [ROWS]
    base = tl.where(top == float("-inf"), 0.0, top)  # a sink of -inf beside logits of -inf
    return top, tl.exp2(sink - base), tl.exp2(peak - base)

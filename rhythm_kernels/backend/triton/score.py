"""The score rule of every Triton pass, forward and backward: what a new attention variant must teach is in this file.

A kernel takes the rule as one argument, asks :func:`rule_of_head` once for what the rule has of the head that it works
on, and hands both on, with the distance ``t - s`` of every pair. :func:`logit` says what the model's softmax is taken
of, :func:`weight_and_slope` its slope as well, :func:`visible` which keys a row sees, :func:`sink_mass` what a sink
takes from it; the short cuts that a rule allows (:func:`absorb_peak`, :func:`weight_in_bits`) stand beside them.

Numerics: float32 throughout. `UNIT` says in what a logit is counted: `1 / UNIT` nats, LOG2E for bits.
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
    """The rule as one kernel argument. A part that is None is not there, and kernels are compiled without it.

    No integers: Triton compiles those that stand in a tuple anew for 1 and for multiples of 16. Where a tensor begins
    at a multiple of 16 bytes or elsewhere makes two kernels too.
    """

    scale: float
    softcap: float | None
    sinks: Tensor | None  # (H,) float32
    slopes: Tensor | None  # (1, H) or (S, H) float32
    slopes_s: float  # from the slopes of one sequence to those of the next: 0 or H
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
    slopes_s = 0.0 if slopes is None or len(slopes) == 1 else float(slopes.stride(0))
    return ScoreRule(
        float(rule.scale), softcap, rule.sinks, slopes, slopes_s, rising, bits, to_bits, ratio - to_bits
    )  # fmt: skip


class HeadRule(NamedTuple):
    """What the rule has of one query head of one sequence, each 0 where the rule is without it."""

    sink: Any  # where the sink is
    slope: Any  # of ALiBi


@triton.jit
def rule_of_head(rule, sequence, head):
    """The :class:`HeadRule` of one query head in one entry of the sequence table."""
    sink = 0
    if rule.sinks is not None:
        sink = rule.sinks + head
    slope = 0.0
    if rule.slopes is not None:
        slope = tl.load(rule.slopes + tl.cast(sequence, tl.int64) * tl.cast(rule.slopes_s, tl.int64) + head)
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
def biased(x, distance, own, rule, UNIT: tl.constexpr):
    """What is :func:`capped` less ALiBi's `slope (t - s)`."""
    if rule.slopes is not None:
        return x - (own.slope * UNIT) * distance.to(tl.float32)
    return x


@triton.jit
def logit(product, distance, own, rule, UNIT: tl.constexpr):
    """`x = softcap(scale q.k) - slope (t - s)`; `own` is of :func:`rule_of_head`."""
    return biased(capped(product, rule, UNIT), distance, own, rule, UNIT)


@triton.jit
def visible(distance, window_left):
    """Whether row t sees key s, `distance = t - s`: causal, and at most `window_left` back, where that is not None."""
    seen = distance >= 0
    if window_left is not None:
        seen = seen & (distance <= window_left)
    return seen


@triton.jit
def absorb_peak(peak, product, distance, own, rule, window_left, SOME_HIDDEN: tl.constexpr):
    """A tile of products into the running maximum of every row, which is kept in bits.

    Returns the new maximum, `exp(x - maximum)` of the tile, 0 where hidden, and the factor by which sums that are
    relative to the maximum before fade.
    """
    if SOME_HIDDEN or rule.softcap is not None or rule.slopes is not None or not rule.rising:
        x = logit(product, distance, own, rule, LOG2E)
        if SOME_HIDDEN:
            x = tl.where(visible(distance, window_left), x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 1))
        base = new_peak
        if SOME_HIDDEN:
            # A row that has seen no key yet subtracts 0, not -inf. Its peak stays -inf: its logits may lie far below 0.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(x - base[:, None])
    else:
        # The largest product is the largest logit: scaling and subtraction become one FMA.
        bits = tl.cast(rule.scale, tl.float32) * LOG2E
        new_peak = tl.maximum(peak, tl.max(product, 1) * bits)
        base = new_peak
        p = tl.exp2(product * bits - base[:, None])
    return new_peak, p, tl.exp2(peak - base)


@triton.jit
def weight(x, lse, UNIT: tl.constexpr):
    """`A = exp(x - lse)`, both in units of `1 / UNIT` nats.

    A known lse comes in nats (`UNIT` 1), and the difference is taken there: scaling both to bits first would round
    each at its size.
    """
    return tl.exp2((x - lse) * (LOG2E / UNIT))


@triton.jit
def weight_and_slope(product, lse, distance, own, rule, UNIT: tl.constexpr):
    """`A` and the slope of the logit, `dx / d(scale q.k)`; `lse` in `1 / UNIT` nats, laid out as `product`."""
    x = capped(product, rule, UNIT)
    a = weight(biased(x, distance, own, rule, UNIT), lse, UNIT)
    if rule.softcap is not None:
        share = x * (1.0 / (tl.cast(rule.softcap, tl.float32) * UNIT))
        return a, 1.0 - share * share
    else:
        return a, 1.0


@triton.jit
def to_bits(x, rule):
    """Nats in the bits of :func:`weight_in_bits`: times a ratio that comes in two parts."""
    return x * tl.cast(rule.to_bits, tl.float32) + x * tl.cast(rule.to_bits_rest, tl.float32)


@triton.jit
def in_bits(lse, rule):
    """A log-sum-exp as :func:`weight_in_bits` wants it: in bits; with ALiBi, which joins it pair by pair, in nats."""
    if rule.slopes is not None:
        return lse
    return to_bits(lse, rule)


@triton.jit
def weight_in_bits(product, lse_bits, distance, own, rule):
    """`A = exp(x - lse)` from a product and lse :func:`in_bits`: one FMA under the exponential.

    The last factor of x, softcap or scale, is rounded in bits. lse went to bits by exactly that number over the factor:
    the two roundings are then the same one, and scale the difference `x - lse` alone, not each at its size.
    """
    if rule.softcap is not None:
        product = tanh(product * (tl.cast(rule.scale, tl.float32) / tl.cast(rule.softcap, tl.float32)))
    if rule.slopes is not None:
        # lse and the bias cancel for the keys that matter, and before anything is rounded at their size.
        lse_bits = to_bits(own.slope * distance.to(tl.float32) + lse_bits, rule)
    return tl.exp2(product * tl.cast(rule.bits, tl.float32) - lse_bits)


@triton.jit
def nothing(own, rule):
    """0; NaN where the sink of this head is `+inf` or NaN, beside which no key has a share. One of `-inf` is none."""
    if rule.sinks is None:
        return 0.0
    else:
        sink = tl.load(own.sink)
        return 0.0 * tl.where(sink == float("-inf"), 0.0, sink)


@triton.jit
def known(lse, zero):
    """A log-sum-exp as it was given; NaN where it is not finite, or `zero`, of :func:`nothing`, is NaN: one FMA."""
    return lse + lse * zero


@triton.jit
def sink_mass(own, rule, lse):
    """What the sink of this head takes of a row: `exp(sink - lse)`, `lse` having the sink in it; 0 without sinks."""
    if rule.sinks is None:
        return 0.0 * lse
    else:
        return weight(tl.load(own.sink), lse, 1.0)


@triton.jit
def absorb_sink(peak, own):
    """The sink into the running maximum, in bits: the new one, the sink's mass and the factor by which sums fade."""
    sink = tl.load(own.sink) * LOG2E
    top = tl.maximum(peak, sink)
    base = tl.where(top == float("-inf"), 0.0, top)  # a sink of -inf beside logits of -inf
    return top, tl.exp2(sink - base), tl.exp2(peak - base)

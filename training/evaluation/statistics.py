"""Statistics of accuracies: standard errors, paired differences, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Z95 = 1.959964
_FINEST = 100_000  # a share right is a fraction of at most so many responses: its float gives it back exactly
_MOST_SUMS, _MOST_WORK = 10**7, 3 * 10**9  # of the exact test: numbers kept, and additions


def mean_error(means: Sequence[float]) -> float:
    """Standard error of the mean of numbers in [0, 1], each the share right of one question.

    By the variance between questions, p (1 - p) - mean(m (1 - m)), over their number. Where every share is 0 or 1, as
    with one response a question, it is the binomial standard error, bit for bit; 0 where there are none.
    """
    n = len(means)
    if n == 0:
        return 0.0
    share, within = math.fsum(means) / n, math.fsum(m * (1 - m) for m in means) / n
    return math.sqrt(max(0.0, share * (1 - share) - within) / n)


@dataclass(frozen=True)
class PairedDifference:
    """How two sets of answers to the same questions differ.

    Attributes:
        difference: share right after, minus share right before.
        low, high: its 95% interval, from the variance of the paired differences.
        p_value: exact two-sided sign-flip test: how often the difference would be as large, if each question's were as
            likely to have the other sign. With one response a question this is McNemar's exact test.
        gained, lost: questions of which a larger share became right, and a smaller one; with one response a question,
            those that became right, and that became wrong.
    """

    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int


def paired_difference(before: Sequence[float], after: Sequence[float]) -> PairedDifference:
    """Compare two runs question by question.

    Args:
        before, after: of each question, whether the answer was right, or the share of several that were.

    Raises:
        ValueError: for sequences that are empty or of different lengths.
    """
    if len(before) == 0 or len(before) != len(after):
        raise ValueError(f"before and after must have one length, at least 1, got {len(before)} and {len(after)}")
    one, two = ([Fraction(share).limit_denominator(_FINEST) for share in shares] for shares in (before, after))
    changes = [a - b for b, a in zip(one, two)]
    gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    n = len(before)
    difference = float(sum(changes) / n)
    error = math.sqrt(max(0.0, float(sum(change**2 for change in changes) / n) - difference**2) / n)
    binary = all(change.denominator == 1 for change in changes)
    return PairedDifference(
        difference=difference,
        low=difference - Z95 * error,
        high=difference + Z95 * error,
        p_value=_mcnemar(gained, lost) if binary else _sign_flips(changes),
        gained=gained,
        lost=lost,
    )


def _mcnemar(gained: int, lost: int) -> float:
    """Twice the tail of a fair coin, at most 1; each term from its logarithm, so that no count overflows."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def _sign_flips(changes: Sequence[Fraction]) -> float:
    """P(|sum of the changes with random signs| >= |their sum|), exactly.

    Shares of k responses are multiples of 1 / k, so sums are whole numbers of some unit, and the chance of each is had
    by adding one question after another. Where the unit is so fine that there are more than `_MOST_SUMS` sums (test
    sets with sample counts that have no common measure), the normal distribution of the same variance stands in.
    """
    unit = math.lcm(*(change.denominator for change in changes))
    steps = [abs(int(change * unit)) for change in changes if change]
    total, observed = sum(steps), abs(int(sum(changes) * unit))
    if observed == 0:
        return 1.0
    if total > _MOST_SUMS or total * len(steps) > _MOST_WORK:
        return math.erfc(observed / math.sqrt(2 * math.fsum(step**2 for step in steps)))
    # Of the steps that are positive the sum is t with chance[t]; the sum with signs is then 2 t - total.
    chance, reached = np.zeros(total + 1), 0
    chance[0] = 1.0
    for step in sorted(steps):
        reached += step
        moved = chance[: reached + 1 - step].copy()
        chance[: reached + 1] /= 2
        chance[step : reached + 1] += moved / 2
    return min(1.0, 2 * float(chance[(total + observed) // 2 :].sum()))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and how far it can be trusted.

    Attributes:
        count: how many values.
        mean: their mean.
        deviation: their standard deviation, with n - 1; NaN for one value.
        error: the standard error of the mean; NaN for one value.
        low, high: the 95% interval of the mean, by Student's t with n - 1 degrees of freedom; infinite for one value.
    """

    count: int
    mean: float
    deviation: float
    error: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and the small-sample interval of a few values.

    Raises:
        ValueError: for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError(f"values must hold at least one, got {values!r}")
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(1, mean, math.nan, math.nan, -math.inf, math.inf)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    error = deviation / math.sqrt(n)
    reach = t_quantile(n - 1) * error
    return Spread(n, mean, deviation, error, mean - reach, mean + reach)


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t for which a Student-distributed value lies in [-t, t] with probability `level`.

    Raises:
        ValueError: for fewer than one degree of freedom, or a level outside (0, 1).
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees must be at least 1 and level inside (0, 1), got {degrees} and {level}")
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees)), in which the probability is smooth and bounded
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _t_inside(angle: float, degrees: int) -> float:
    """P(|T| <= t) at t = sqrt(degrees) tan(angle): a finite sum for whole degrees of freedom (Abramowitz, 26.7.3-4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 0.0
    if degrees % 2:
        for i in range(1, degrees - 1, 2):  # cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 + ... up to cos^(degrees - 2)
            term = cosine if i == 1 else term * cosine**2 * (i - 1) / i
            total += term
        return (angle + sine * total) * 2 / math.pi
    for i in range(0, degrees - 1, 2):  # 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ... up to cos^(degrees - 2)
        term = 1.0 if i == 0 else term * cosine**2 * (i - 1) / i
        total += term
    return sine * total

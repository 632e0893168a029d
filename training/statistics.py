"""Statistics of accuracies: standard errors, paired differences, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964


def standard_error(successes: int, trials: int) -> float:
    """Binomial standard error of a share; 0 where there are no trials."""
    if trials == 0:
        return 0.0
    share = successes / trials
    return math.sqrt(share * (1 - share) / trials)


@dataclass(frozen=True)
class PairedDifference:
    """How two sets of answers to the same questions differ.

    Attributes:
        difference: share right after, minus share right before.
        low, high: its 95% interval, from the variance of the paired differences.
        p_value: exact two-sided McNemar test (is it as often right-to-wrong as wrong-to-right?).
        gained, lost: questions that became right, and that became wrong.
    """

    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> PairedDifference:
    """Compare two runs question by question.

    Raises:
        ValueError: for sequences that are empty or of different lengths.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"before and after must have one length, at least 1, got {len(before)} and {len(after)}")
    gained = sum(not b and a for b, a in zip(before, after))
    lost = sum(b and not a for b, a in zip(before, after))
    n = len(before)
    difference = (gained - lost) / n
    error = math.sqrt(max(0.0, (gained + lost) / n - difference**2) / n)
    return PairedDifference(
        difference=difference,
        low=difference - Z95 * error,
        high=difference + Z95 * error,
        p_value=_mcnemar(gained, lost),
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

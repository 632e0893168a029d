"""The little statistics a comparison of accuracies needs."""

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
        raise ValueError(f"before and after must be as long as each other and not empty: {len(before)}, {len(after)}")
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
    """Twice the tail of a fair coin, at most 1, summed in logarithms so that no count overflows."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)

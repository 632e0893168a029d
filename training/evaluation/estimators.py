"""What several responses to each question say of a model: accuracy, pass@k, and how far they can be trusted.

Of n responses to a question c are right. Accuracy is the mean of c / n over questions, called avg@n, and estimates
pass@1. Which questions were asked is the chance that intervals are about: they come from the bootstrap over questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000  # of the bootstrap
_SEED = 0  # so that an interval is the same wherever it is computed
_LEVEL = 0.95


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n responses, drawn without putting back, hold one of the c right ones.

    1 - C(n - c, k) / C(n, k): over the draws of n responses it has no bias as an estimate of the chance that one of k
    responses is right (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"c must be in 0..n and k in 1..n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    none = 1.0  # C(n - c, k) / C(n, k), factor by factor: the chance that none of the k is right
    for i in range(k):
        none *= (n - c - i) / (n - i)
    return 1.0 - none


def ks(n: int) -> list[int]:
    """The k at which pass@k of n responses is given: 1, 2, 4, ... and n."""
    powers = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [*powers, n]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, and its 95% interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(strata: Sequence[Any], weights: Sequence[float], resamples: int = RESAMPLES) -> list[Estimate]:
    """Weighted sums of the strata's means, with percentile intervals, every stratum resampled by itself.

    A resample draws as many questions as a stratum has, putting each back. Questions with the same values are alike, so
    only how many of each kind are drawn matters: one multinomial draw a resample, however many questions there are.

    Args:
        strata: for each a (questions, columns) array; columns are statistics of a question, and alike in all strata.
        weights: of each stratum's mean. n_s / n gives the mean over all questions, 1 / (number of strata) the mean of
            the strata's means.
        resamples: how many.

    Returns:
        An estimate for each column.

    Raises:
        ValueError: where a stratum is empty, or there are not as many weights as strata.
    """
    if not strata or len(strata) != len(weights) or any(len(values) == 0 for values in strata):
        raise ValueError(
            f"strata must hold a question each and be as many as weights, got {[len(s) for s in strata]} and "
            f"{len(weights)} weights"
        )
    random = np.random.default_rng(_SEED)
    tables = [np.asarray(values, dtype=float) for values in strata]
    columns = tables[0].shape[1]
    means, drawn = np.zeros(columns), np.zeros((resamples, columns))
    for table, weight in zip(tables, weights):
        kinds, counts = np.unique(table, axis=0, return_counts=True)
        n = len(table)
        means += weight * table.mean(axis=0)
        drawn += weight * (random.multinomial(n, counts / n, size=resamples) @ kinds) / n
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(means, low, high)]


def pass_estimates(right: Mapping[str, Sequence[tuple[int, int]]]) -> dict[int, Estimate]:
    """pass@k with its interval, for each k that every question has responses for; pass@1 is the accuracy.

    Args:
        right: for each test set, (n, c) of each of its questions: responses, and right ones.
    """
    fewest = min(n for pairs in right.values() for n, _ in pairs)
    found = ks(fewest)
    # pass@1 is c / n: said so, because the product in `pass_at_k` rounds, and accuracies are exact shares
    strata = [
        np.array([[c / n if k == 1 else pass_at_k(n, c, k) for k in found] for n, c in pairs])
        for pairs in right.values()
    ]
    total = sum(map(len, strata))
    return dict(zip(found, bootstrap(strata, [len(values) / total for values in strata])))

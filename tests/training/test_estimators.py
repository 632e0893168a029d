"""pass@k and the bootstrap, against enumeration, closed forms and simulated questions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from training.evaluation.estimators import bootstrap, ks, pass_at_k, pass_estimates


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))  # the first c responses are the right ones
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_has_no_bias():
    """Over all draws of n responses, each right with chance p, its mean is the chance that one of k is right."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)
        if k > 1:  # the estimate that suggests itself has one
            naive = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - (1 - c / n) ** k) for c in range(n + 1))
            assert abs(naive - (1 - (1 - p) ** k)) > 0.01


def test_pass_at_k_of_many_responses():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10_000, 5_000, 1) == pytest.approx(0.5)
    assert pass_at_k(10_000, 9_999, 2) == 1


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match=r"c must be in 0\.\.n and k in 1\.\.n"):
        pass_at_k(n, c, k)


def test_ks():
    assert [ks(n) for n in (1, 2, 3, 4, 12, 16)] == [
        *([1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8, 12], [1, 2, 4, 8, 16])
    ]


def column(*values):
    return np.array(values, dtype=float).reshape(-1, 1)


def test_bootstrap_of_one_stratum_is_binomial():
    """Resampled means of 0s and 1s are binomial counts over n: their quantiles are known."""
    (found,) = bootstrap([column(*[1] * 30, *[0] * 70)], [1.0], resamples=200_000)
    chances = [math.comb(100, c) * 0.3**c * 0.7 ** (100 - c) for c in range(101)]
    cumulated = list(itertools.accumulate(chances))
    low, high = (next(c for c in range(101) if cumulated[c] >= share) / 100 for share in (0.025, 0.975))
    assert (found.value, found.low, found.high) == tuple(map(pytest.approx, (0.3, low, high)))


def test_bootstrap_is_that_of_drawing_questions():
    """Against the plain way, which draws an index for each question of each resample, in two strata and columns."""
    random = np.random.default_rng(1)
    strata = [random.integers(0, 5, (20, 2)) / 4, random.integers(0, 3, (50, 2)) / 2]
    drawn = np.zeros((20_000, 2))
    for values, weight in zip(strata, (0.25, 0.75)):
        drawn += weight * values[random.integers(0, len(values), (20_000, len(values)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    for at, found in enumerate(bootstrap(strata, [0.25, 0.75])):
        assert found.value == pytest.approx(0.25 * strata[0][:, at].mean() + 0.75 * strata[1][:, at].mean())
        assert (found.low, found.high) == (pytest.approx(low[at], abs=0.004), pytest.approx(high[at], abs=0.004))


def test_strata_are_drawn_by_themselves():
    """Two sets that are certain, one all right and one all wrong: nothing is left to chance."""
    (found,) = bootstrap([column(1, 1, 1), column(0, 0)], [0.6, 0.4])
    assert (found.value, found.low, found.high) == (pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.6))
    (mixed,) = bootstrap([column(1, 1, 1, 0, 0)], [1.0])
    assert mixed.low < 0.5 and mixed.high > 0.7


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Questions with chances of their own, four responses each: 95% of intervals hold the mean chance."""
    random, inside, trials = np.random.default_rng(2), 0, 200
    for _ in range(trials):
        chances = random.beta(1, 2, size=80)  # mean 1 / 3
        right = random.binomial(4, chances)
        found = pass_estimates({"": [(4, int(c)) for c in right]})[1]
        inside += found.low <= 1 / 3 <= found.high
    assert inside / trials == pytest.approx(0.95, abs=0.035)


def test_pass_estimates_by_question():
    right = {"small": [(4, 4), (4, 0)], "large": [(2, 1)] * 6}
    found = pass_estimates(right)
    assert list(found) == [1, 2]  # those that every question has responses for
    assert found[1].value == pytest.approx((1 + 0 + 6 * 0.5) / 8)
    assert found[2].value == pytest.approx((1 + 0 + 6 * 1) / 8)
    assert pass_estimates(right) == found  # always the same


@pytest.mark.parametrize(("strata", "weights"), [([], []), ([column()], [1.0]), ([column(1)], [0.5, 0.5])])
def test_bootstrap_refuses(strata, weights):
    with pytest.raises(ValueError, match="strata must hold a question each"):
        bootstrap(strata, weights)

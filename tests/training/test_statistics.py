"""Standard errors, paired intervals and McNemar's test, against figures worked by hand and against scipy's formula."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from training.evaluation import statistics
from training.evaluation.statistics import mean_error, paired_difference, spread, t_quantile


def test_paired_difference_by_hand():
    before = [True, True, False, False, False, False, False, False]
    after = [True, False, True, True, True, True, False, False]
    found = paired_difference(before, after)
    assert (found.gained, found.lost) == (4, 1)
    assert found.difference == pytest.approx(3 / 8)
    error = math.sqrt((5 / 8 - (3 / 8) ** 2) / 8)
    assert found.low == pytest.approx(3 / 8 - 1.959964 * error)
    assert found.high == pytest.approx(3 / 8 + 1.959964 * error)
    assert found.p_value == pytest.approx(2 * (1 + 5) / 2**5)  # at most one of five fair coins, twice


def test_no_change_is_no_evidence():
    found = paired_difference([True, False], [True, False])
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_large_counts_do_not_overflow():
    found = paired_difference([False] * 5000, [True] * 5000)
    assert 0 <= found.p_value < 1e-300
    assert found.difference == 1


def test_mean_error():
    """One response a question: the binomial formula to the last bit. Several: the deviation between questions."""
    for hits, n in ((128, 512), (1, 3), (7, 11), (0, 5), (5, 5)):
        share = hits / n
        assert mean_error([1.0] * hits + [0.0] * (n - hits)) == math.sqrt(share * (1 - share) / n)
    means = [0.25, 0.5, 1.0, 0.0, 0.75]
    assert mean_error(means) == pytest.approx(math.sqrt(sum((m - 0.5) ** 2 for m in means) / 5 / 5))
    assert mean_error([0.5, 0.5]) == mean_error([]) == 0


def test_paired_difference_of_shares_by_hand():
    found = paired_difference([0.25, 0.5, 1.0, 0.0], [0.75, 0.5, 0.75, 0.5])
    assert (found.gained, found.lost) == (2, 1)
    assert found.difference == pytest.approx(0.75 / 4)
    error = math.sqrt(((0.25 + 0.0625 + 0.25) / 4 - (0.75 / 4) ** 2) / 4)
    assert found.low == pytest.approx(0.75 / 4 - 1.959964 * error)
    assert found.high == pytest.approx(0.75 / 4 + 1.959964 * error)
    # 2, -1 and 2 quarters make 3; with other signs 5, 3, -3 and -5 are as large, and 1, 1, -1 and -1 are not
    assert found.p_value == pytest.approx(4 / 8)


def test_sign_flips_are_those_of_enumeration():
    random = Random(3)
    for _ in range(60):
        samples = random.choice([2, 3, 4, 16])
        before, after = ([random.randint(0, samples) / samples for _ in range(9)] for _ in range(2))
        steps = [round((a - b) * samples) for b, a in zip(before, after)]
        sums = [sum(s * step for s, step in zip(signs, steps)) for signs in itertools.product((1, -1), repeat=9)]
        known = sum(abs(s) >= abs(sum(steps)) for s in sums) / len(sums)
        assert paired_difference(before, after).p_value == pytest.approx(known)


def test_sign_flips_of_single_answers_are_mcnemars_test():
    for gained, lost in ((4, 1), (10, 10), (0, 7), (0, 0), (61, 35)):
        found = paired_difference([0] * gained + [1] * lost + [1], [1] * gained + [0] * lost + [1])
        signs = statistics._sign_flips([statistics.Fraction(1)] * gained + [statistics.Fraction(-1)] * lost)
        assert found.p_value == pytest.approx(signs)


def test_p_of_no_change_is_evenly_spread():
    """Two runs of one model: p is below 0.05 in about one case of twenty, and below 0.5 in about half.

    A little less often, because sums come in steps.
    """
    random = Random(4)
    found = []
    for _ in range(400):
        chances = [random.random() for _ in range(100)]
        before, after = ([sum(random.random() < p for _ in range(8)) / 8 for p in chances] for _ in range(2))
        found.append(paired_difference(before, after).p_value)
    assert sum(p < 0.05 for p in found) / 400 == pytest.approx(0.05, abs=0.03)
    assert sum(p < 0.5 for p in found) / 400 == pytest.approx(0.48, abs=0.06)


def test_shares_without_a_common_measure_have_the_normal_test(monkeypatch):
    random = Random(5)
    before, after = ([random.randint(0, 8) / 8 for _ in range(60)] for _ in range(2))
    exact = paired_difference(before, after).p_value
    monkeypatch.setattr(statistics, "_MOST_SUMS", 10)
    normal = paired_difference(before, after).p_value
    assert normal != exact
    assert normal == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_unequal_lengths_are_refused(before, after):
    with pytest.raises(ValueError, match="must have one length"):
        paired_difference(before, after)


@pytest.mark.parametrize(
    ("degrees", "level", "known"),
    [  # printed tables of Student's t, two-sided
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (3, 0.95, 3.18245),
        (4, 0.95, 2.77645),
        (5, 0.95, 2.57058),
        (9, 0.95, 2.26216),
        (30, 0.95, 2.04227),
        (1000, 0.95, 1.96234),
        (1, 0.99, 63.6567),
        (2, 0.99, 9.92484),
        (7, 0.9, 1.89458),
    ],
)
def test_t_quantile(degrees, level, known):
    assert t_quantile(degrees, level) == pytest.approx(known, rel=3e-6)


def test_spread_by_hand():
    found = spread([0.44, 0.46, 0.42])
    assert found.count == 3
    assert found.mean == pytest.approx(0.44)
    assert found.deviation == pytest.approx(0.02)
    assert found.error == pytest.approx(0.02 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    alone = spread([0.5])
    assert (alone.count, alone.mean, alone.low, alone.high) == (1, 0.5, -math.inf, math.inf)
    assert math.isnan(alone.deviation) and math.isnan(alone.error)


def test_the_interval_of_three_values_holds_its_mean_as_often_as_it_says():
    random = Random(0)
    inside = 0
    for _ in range(4000):
        found = spread([random.gauss(0, 1) for _ in range(3)])
        inside += found.low <= 0 <= found.high
    assert inside / 4000 == pytest.approx(0.95, abs=0.015)  # with the normal 1.96 it is 0.81


@pytest.mark.parametrize(("degrees", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_no_quantile(degrees, level):
    with pytest.raises(ValueError, match="at least 1 and level inside"):
        t_quantile(degrees, level)


def test_no_values():
    with pytest.raises(ValueError, match="at least one, got"):
        spread([])

"""Standard errors, paired intervals and McNemar's test, against figures worked by hand and against scipy's formula."""

from __future__ import annotations

import math

import pytest

from training.statistics import paired_difference, standard_error


def test_standard_error():
    assert standard_error(128, 512) == pytest.approx(math.sqrt(0.25 * 0.75 / 512))
    assert standard_error(0, 10) == 0
    assert standard_error(0, 0) == 0


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


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_unequal_lengths_are_refused(before, after):
    with pytest.raises(ValueError, match="as long as each other"):
        paired_difference(before, after)

"""Means over seeds and paired differences: by hand, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.paired import Difference, critical_t, mean_of, paired_difference


def test_the_standard_error_by_hand() -> None:
    found = mean_of([1.0, 2.0, 6.0])  # squared deviations 4 + 1 + 9 = 14; s = √7
    assert found.mean == 3.0 and found.standard_error == pytest.approx(math.sqrt(7 / 3)) and found.num_values == 3
    assert mean_of([5.0]).standard_error is None


def test_an_interval_by_hand() -> None:
    baseline = {0: 0.0, 1: 10.0, 2: 20.0, 7: 99.0}
    found = paired_difference({0: 1.0, 1: 12.0, 2: 26.0, 5: 99.0}, baseline)  # seeds 5 and 7 have no partner
    margin = 4.302652729696142 * math.sqrt(7 / 3)  # t of a table, 2 degrees of freedom
    assert found is not None and found.num_pairs == 3
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - margin, 3 + margin))


def test_one_pair_has_no_interval_and_none_no_difference() -> None:
    assert paired_difference({3: 1.5}, {3: 1.0, 4: 0.0}) == Difference(0.5, None, None, 1)
    assert paired_difference({3: 1.5}, {4: 1.0}) is None


@pytest.mark.parametrize("num_pairs", [2, 3, 4, 5, 8, 15, 60])
def test_against_scipy(num_pairs: int) -> None:
    draw = np.random.default_rng(num_pairs)
    one, other = draw.normal(size=(2, num_pairs))
    found = paired_difference(dict(enumerate(one)), dict(enumerate(other)))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found is not None and (found.low, found.high) == pytest.approx((expected.low, expected.high))
    for confidence in (0.5, 0.9, 0.99, 0.999):
        t = critical_t(confidence, num_pairs - 1)
        assert t == pytest.approx(stats.t.ppf((1 + confidence) / 2, num_pairs - 1), rel=1e-9)

"""Timetables in a loop of one's own; those of the plan are the same functions (tests/test_plan.py)."""

from __future__ import annotations

import dataclasses
import doctest
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.sparse import METHODS, DueUpdate, Strategy, method, timetable, timing


def test_rigl_is_as_its_paper_has_it() -> None:
    updates = timetable("rigl", 1000)  # ΔT = 100, α = 0.3, T_end = 750
    assert updates.steps() == [99, 199, 299, 399, 499, 599, 699]
    update = updates.at(299)
    assert update is not None
    assert update.drop_fraction == pytest.approx(0.15 * (1 + 0.30901699))  # cos(0.4π)
    assert [updates.at(step) for step in (0, 98, 100, 799, 999)] == [None] * 5


def test_lengths_in_epochs_need_their_number_of_steps() -> None:
    updates = timetable("set", 50, steps_per_epoch=10)
    assert updates.steps() == [9, 19, 29, 39]  # never the last step
    assert updates.at(9) == DueUpdate(0.3)
    with pytest.raises(ConfigError, match=r"steps_per_epoch: is required, .* '1 epochs'; do: pass steps_per"):
        timetable("set", 50)


def test_granet_lands_on_its_density() -> None:
    strategy = method("granet", update_interval="10 steps", density_until="3 epochs")
    updates = timetable(strategy, 60, steps_per_epoch=10, density=0.1)
    found = [updates.at(step) for step in updates.steps()]
    # 0.1 + 0.4·(1 − x)³ at x = 1/3, 2/3, 1; then the density stays
    expected = [0.1 + 0.4 * 8 / 27, 0.1 + 0.4 / 27, 0.1, None, None]
    assert [update and update.density for update in found] == [pytest.approx(value) for value in expected]
    with pytest.raises(ConfigError, match=r"density: this method starts at density 0\.5"):
        timetable(strategy, 60, steps_per_epoch=10)
    with pytest.raises(ConfigError, match=r"density_until: no update follows 3 epochs \(step 30 of 30\)"):
        timetable(strategy, 30, steps_per_epoch=10, density=0.1)


def test_methods_without_updates_have_none() -> None:
    assert [timetable(name, 300).steps() for name in ("dense", "static")] == [[], []]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "rigel",
            r"method: 'rigel' is not one of dense, .*; did you mean 'rigl'\? do: correct the name, or pass a Strategy",
        ),
        (Strategy("gradient", update_interval="100"), "expected a number of steps or epochs, got '100'"),
        (Strategy("gradient", update_interval="5 samples"), "expected a number of steps or epochs, got '5 samples'"),
    ],
)
def test_what_has_no_timetable_is_refused(given: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        timetable(given, 100)


def test_an_interval_of_ones_own() -> None:
    assert timetable(dataclasses.replace(METHODS["rigl"], update_interval="250 steps"), 1000).steps() == [249, 499]


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(timing).attempted == 3
    assert doctest.testmod(timing).failed == 0

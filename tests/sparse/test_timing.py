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


def test_gmp_follows_its_cubic_curve_from_dense_without_replacing_anything() -> None:
    updates = timetable(
        method("gmp", update_interval="10 steps", density_until="3 epochs"), 60, steps_per_epoch=10, density=0.1
    )
    # Zhu & Gupta, eq. 1, with s_i = 0 and s_f = 0.9: sparsity 0.9 − 0.9·(1 − x)³ at x = 1/3, 2/3, 1
    expected = [DueUpdate(0.0, pytest.approx(1 - s)) for s in (0.9 - 0.9 * 8 / 27, 0.9 - 0.9 / 27, 0.9)]
    assert updates.steps() == [9, 19, 29]
    assert [updates.at(step) for step in updates.steps()] == expected


def test_acdc_is_dense_and_sparse_in_turn_as_in_the_papers_code() -> None:
    updates = timetable("acdc", 100, steps_per_epoch=1, density=0.2)
    found = {step + 1: updates.at(step) for step in updates.steps()}
    # configs/neurips/iht_imagenet_resnet50_insta_cosinelr_s80_ep100.yaml: pruned at 10, 20, … 70 and 85, restored at
    # 15, 25, … 65 and 75
    assert [epoch for epoch, update in found.items() if update == DueUpdate(0.0, 0.2)] == [*range(10, 71, 10), 85]
    assert [epoch for epoch, update in found.items() if update == DueUpdate(0.0, 1.0)] == [*range(15, 66, 10), 75]
    assert len(found) == 15
    density, dense_epochs = 1.0, 0
    for epoch in range(100):
        density = found[epoch].density if epoch in found else density
        dense_epochs += density == 1
    assert dense_epochs == 50


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

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import schedules

FACTS = json.loads((Path(__file__).parent / "conformance.json").read_text())


def test_itop_cosine_equals_the_authors_values_and_never_rises_again() -> None:
    drop = schedules.cosine(0.5, 0.005, 1000)
    for step, values in FACTS["cosine_drop_fraction p0=0.5 eta=0.005 T=1000"].items():
        assert drop(int(step)) == pytest.approx(values["official"], rel=1e-12)
    assert drop(1500) == 0.005


def test_rigl_cosine_stops() -> None:
    drop = schedules.rigl_cosine(0.3, 25000)
    for step, value in FACTS["rigl_cosine alpha=0.3 T_end=25000"].items():
        assert drop(int(step)) == pytest.approx(value, abs=1e-15)
    assert drop(30000) == 0


def test_mest_stairs_by_hand() -> None:
    drop = schedules.stairs(0.2, 160)  # 2% of all weights are 0.2 of the active ones at 90%
    assert [drop(epoch) for epoch in (0, 89, 90, 119, 120, 160)] == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]


def test_granet_density_is_clamped_and_lands_exactly() -> None:
    density = schedules.cubic(0.5, 0.1, 0, 300)
    for step, value in FACTS["granet density D_i=0.5 D_f=0.1 t0=0 t1=300"].items():
        assert density(int(step)) == pytest.approx(value, rel=1e-12)
    assert density(300) == 0.1


def test_triangular_rate_equals_the_authors_values() -> None:
    steps_per_epoch = 1000
    rate = schedules.triangular(0.001, 0.005, 8 * steps_per_epoch)
    for key, value in FACTS["triangular_lr cycle=8 epochs low=0.001 high=0.005"].items():
        epoch, part = key.removeprefix("epoch").split("+")
        assert rate(round((int(epoch) + float(part)) * steps_per_epoch)) == pytest.approx(value, rel=1e-12)


def test_steps_and_stairs_by_hand() -> None:
    rate = schedules.step_decay(1.0, [10, 20], 0.1)
    assert [rate(9), rate(10), rate(20)] == pytest.approx([1.0, 0.1, 0.01])
    stairs = schedules.warmup(schedules.constant(0.6), 5, 10)  # 5 epochs of 10 steps: 0.6·(e + 1)/6
    assert [stairs(0), stairs(9), stairs(10), stairs(49), stairs(50)] == pytest.approx([0.1, 0.1, 0.2, 0.5, 0.6])
    assert schedules.linear(1.0, 0.0, 4)(1) == 0.75
    assert schedules.linear(1.0, 0.0, 4)(9) == 0.0

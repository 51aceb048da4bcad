"""What is shown of training: which parts fit, how long it will take, and when a run is said to learn nothing."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace

import pytest
import torch

from pipeline import schedules
from pipeline.plan import Phase, Plan
from pipeline.sparse.timing import UpdateSchedule
from pipeline.training import display as module
from pipeline.training.display import Display, warmup_stop
from pipeline.training.divergence import Window, divergence
from pipeline.training.pace import NUM_STEPS, Pace, num_evaluations
from pipeline.training.step_line import Standing, fitting, parts, whole

STANDING = Standing(
    phase="refinement-1",
    step=150,
    num_steps=240,
    steps_per_epoch=30,
    lr=0.04841,
    loss=1.23456,
    top1=0.5,
    val_top1=0.4567,
    r_s=0.1784,
    images_per_second=219.4,
    data_wait_share=0.097,
    phase_seconds_left=9,
    run_seconds_left=3725,
)


def test_the_line_has_everything_where_there_is_room() -> None:
    expected = (
        "refinement-1  epoch 5.0/8  step 150/240  loss 1.2346  top-1 50.0%  val 45.7%  lr 0.0484  R_s 0.178  "
        "219 images/s  wait 10%  phase 0:09  run 1:02:05 left"
    )
    assert whole(parts(STANDING)) == expected == fitting(parts(STANDING), len(expected))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (100, "refinement-1  epoch 5.0/8  step 150/240  loss 1.2346  val 45.7%  219 images/s  run 1:02:05 left"),
        (80, "refinement-1  epoch 5.0/8  step 150/240  loss 1.2346  run 1:02:05 left"),
        (60, "refinement-1  step 150/240  loss 1.2346  run 1:02:05 left"),
        (40, "refinement-1  step 150/240  loss 1.2346"),
        (5, "refinement-1"),  # is cut by the live line
    ],
)
def test_the_least_important_parts_are_left_out(columns: int, expected: str) -> None:
    assert fitting(parts(STANDING), columns) == expected


def test_on_a_gpu_it_has_the_speed_of_the_network_and_the_memory() -> None:
    on_gpu = replace(STANDING, model_flops=48.71e12, peak_gpu_gib=31.42)
    assert "  wait 10%  48.7 TFLOP/s  peak 31.4 GiB  phase 0:09  " in whole(parts(on_gpu))
    assert "peak" not in fitting(parts(on_gpu), len(whole(parts(on_gpu))) - 1)


def test_what_is_not_known_is_not_shown() -> None:
    assert whole(parts(Standing("exploration", 1, 20, 10, 0.1))) == "exploration  epoch 0.1/2  step 1/20  lr 0.1"


def test_pace() -> None:
    pace = Pace()
    assert pace.seconds_for(10) is None
    pace.add_step(1.0)
    pace.add_step(3.0)
    assert pace.seconds_for(10) == pytest.approx(20, rel=2 / NUM_STEPS)
    pace.add_evaluation(4.0)
    pace.add_evaluation(6.0)
    assert pace.seconds_for(0, num_evaluations=3) == pytest.approx(15)
    for _ in range(10 * NUM_STEPS):  # it follows a change
        pace.add_step(0.5)
    assert pace.seconds_for(10) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize(
    ("start", "stop", "every", "expected"),
    [
        (0, 12, 5, 4),  # after 5, 8, 10 and 12 steps
        (5, 12, 5, 3),
        (5, 8, 5, 1),
        (0, 12, 4, 3),  # after 4, 8 and 12: the end of a phase counts once
        (0, 12, 0, 0),
    ],
)
def test_evaluations_that_are_still_to_come(start: int, stop: int, every: int, expected: int) -> None:
    assert num_evaluations(start, stop, every=every, phase_stops=[8, 12]) == expected


# -- divergence

RULE = {"num_classes": 10, "steps_per_epoch": 100, "batch": 128, "warmup_stop": 0}


def curve(losses: list[float], top1s: list[float], *, length: int = 50) -> list[Window]:
    return [
        Window(i * length, (i + 1) * length, loss, top1)
        for i, (loss, top1) in enumerate(zip(losses, top1s, strict=True))
    ]


def first_told(windows: list[Window], **rule: int) -> str:
    """What is said first while the run goes on."""
    for end in range(1, len(windows) + 1):
        if told := divergence(windows[:end], **RULE | rule):
            return f"{windows[end - 1].stop}: {told}"
    return ""


def test_a_loss_that_stays_high_is_divergence() -> None:
    told = first_told(curve([2.3, 2.0, 8.0, 9.0, 40.0, 35.0, 30.0, 30.0], [0.1, 0.3] + [0.2] * 6))
    assert told.startswith("350: the loss has been above 3.45 for 250 steps, and is 30 now (guessing has 2.3)")
    assert told.endswith(
        "training has diverged; look at the labels, at data.mean and data.std, and at the learning rate"
    )


def test_accuracy_at_chance_is_reported_after_the_warmup_and_some_epochs() -> None:
    flat = curve([2.303] * 40, [0.1] * 40)
    assert first_told(flat).startswith(
        "300: top-1 on training images is 10.00% over the last 300 steps, as by guessing one of 10 classes"
    )
    assert first_told(flat, warmup_stop=500).startswith("800: ")
    assert first_told(flat, steps_per_epoch=100_000).startswith("2000: ")  # a set that is large enough for 2,000 steps
    assert first_told(flat, steps_per_epoch=1).startswith("250: ")  # five windows, and 200 steps


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_no_alarm_on_runs_that_learn(num_classes: int) -> None:
    """Slow starts, spikes and noise of windows."""
    noise = random.Random(0)
    guessing, chance = math.log(num_classes), 1 / num_classes
    for speed in (0.5, 3, 10):  # epochs in which the loss falls to 1/e
        learnt = [1 - math.exp(-i / (2 * speed)) for i in range(60)]
        losses = [guessing * (1.3 - share) * noise.uniform(0.9, 1.1) for share in learnt]
        losses[20:23] = [5 * guessing] * 3  # a spike
        top1s = [chance + (0.9 - chance) * share + noise.gauss(0, 0.01) for share in learnt]
        assert first_told(curve(losses, top1s), num_classes=num_classes) == ""


def test_no_alarm_on_short_jobs() -> None:
    assert first_told(curve([9.0] * 90, [0.1] * 90, length=1)) == ""
    assert first_told(curve([9.0] * 4, [0.1] * 4)) == ""


# -- the display


def plan(*lengths: int, schedule: schedules.Schedule | None = None) -> Plan:
    still = UpdateSchedule(
        num_steps=1,
        update_interval=None,
        drop_schedule=schedules.constant(0.0),
        opening_drop=None,
        density_schedule=None,
        density_until=0,
    )
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    phases = [
        Phase(f"phase-{i}", stop - length, stop, schedule or schedules.constant(0.1), still, None)
        for i, (stop, length) in enumerate(zip(stops, lengths, strict=True))
    ]
    return Plan(tuple(phases), steps_per_epoch=10, global_batch=4, reference_steps=stops[-1])


def test_a_log_has_a_line_for_each_window_or_evaluation_and_says_once_that_nothing_is_learnt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))  # a second a step
    shown = Display(run := plan(20, 580), num_classes=10)
    shown.evaluation_every = 20
    beside = []
    numbers = {"r_s": 0.2, "images_per_second": 4.0, "data_wait_share": 0.0}
    with caplog.at_level(logging.INFO):
        for step in range(600):
            shown.step(step, phase := run.at(step), torch.tensor(2.3))
            if step % 10 == 9:
                shown.window(step, phase, num_steps=10, loss=2.3, top1=0.1, **numbers)
            if step % 20 == 19:
                shown.evaluated(step, phase, val_top1=0.1, seconds=6.0)
                beside.append(shown.beside_evaluation(step, phase))
                next(clock), next(clock), next(clock), next(clock), next(clock), next(clock)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert len(lines) == len(beside) == 30
    assert lines[0] == (
        "phase-0  epoch 1.0/60  step 10/600  loss 2.3000  top-1 10.0%  lr 0.1  R_s 0.200  4 images/s  wait 0%  "
        "phase 0:10  run 9:50 left"
    )
    # 580 steps of a second and 29 evaluations of 6 s
    assert beside[0] == "training loss 2.3000, 4 images/s, 12:34 left"
    assert lines[1].startswith(
        "phase-1  epoch 3.0/60  step 30/600  loss 2.3000  top-1 10.0%  val 10.0%  lr 0.1  R_s 0.2"
    )
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and warned[0].startswith("top-1 on training images is 10.00% over the last 200 steps")


def test_the_end_of_the_warmup() -> None:
    assert warmup_stop(plan(100).phases[0]) == 0
    assert warmup_stop(plan(100, schedule=schedules.warmup(schedules.constant(0.1), 3, 10)).phases[0]) == 30
    assert warmup_stop(plan(100, schedule=lambda step: step / 100).phases[0]) == 99

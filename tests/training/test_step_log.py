"""The report of training steps; tests/distributed/test_agreement.py has the means over two ranks."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.config.load import load_config
from pipeline.distributed.session import Session
from pipeline.plan import build_plan
from pipeline.sparse import Sparsifier
from pipeline.tracking.tracker import NullTracker
from pipeline.training.profiler import ProfileWindow
from pipeline.training.step_log import StepLog


class Tracker(NullTracker):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.records: dict[int, Mapping[str, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.records[step] = metrics


def test_loss_and_top1_are_means_since_the_last_report_and_time_aside_is_not_counted() -> None:
    plan = build_plan(load_config("fashion_mnist_s90"), steps_per_epoch=468)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), "set", density=0.5, seed=0)
    tracker, loader, session = Tracker(), SimpleNamespace(seconds_waited=0.0), Session()
    untyped: Any = loader
    log = StepLog(tracker, plan, untyped, session, every=2)
    started = time.perf_counter()
    for step, (loss, top1) in enumerate([(4.0, 0.0), (2.0, 0.5), (1.0, 0.75), (0.5, 1.0)]):
        log.step(step, plan.at(step), torch.tensor(loss), torch.tensor(top1), torch.tensor(7.0), sparsifier, None)
        if step == 1:
            with log.aside:
                time.sleep(0.5)
    assert time.perf_counter() - started >= 0.5
    assert [(step, found["train/loss"], found["train/top1"]) for step, found in tracker.records.items()] == [
        (1, 3.0, 0.25),
        (3, 0.75, 0.875),
    ]
    assert tracker.records[3]["train/gradient_norm"] == 7.0
    assert tracker.records[3]["time/step_seconds"] < 0.1  # two steps, without the half second between them
    assert tracker.records[3]["time/images_per_second"] == pytest.approx(
        128 / tracker.records[3]["time/step_seconds"], rel=1e-9
    )


def test_a_run_that_is_resumed_reports_the_same_means_but_counts_its_own_time() -> None:
    plan = build_plan(load_config("fashion_mnist_s90"), steps_per_epoch=468)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), "set", density=0.5, seed=0)
    untyped: Any = SimpleNamespace(seconds_waited=0.0)

    def step(log: StepLog, number: int, loss: float) -> None:
        log.step(number, plan.at(number), torch.tensor(loss), torch.tensor(0.5), torch.tensor(1.0), sparsifier, None)

    stopped = StepLog(Tracker(), plan, untyped, Session(), every=3)
    step(stopped, 0, 4.0)
    step(stopped, 1, 2.0)
    tracker = Tracker()
    resumed = StepLog(tracker, plan, untyped, Session(), every=3, window=stopped.window.clone())
    step(resumed, 2, 0.0)
    assert (tracker.records[2]["train/loss"], tracker.records[2]["train/top1"]) == (2.0, 0.5)
    rate = tracker.records[2]["time/images_per_second"] * tracker.records[2]["time/step_seconds"]
    assert rate == pytest.approx(128)  # one step of this process, not three


def test_the_speed_of_the_network_is_that_of_dense_kernels_and_a_cpu_has_no_gpu_memory() -> None:
    plan = build_plan(load_config("fashion_mnist_s90"), steps_per_epoch=468)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "set", density=0.5, seed=0, macs={"0.weight": 16, "1.weight": 16})
    tracker, untyped = Tracker(), cast("Any", SimpleNamespace(seconds_waited=0.0))
    log = StepLog(tracker, plan, untyped, Session(), every=1)
    log.step(0, plan.at(0), torch.tensor(1.0), torch.tensor(0.5), torch.tensor(1.0), sparsifier, None)
    found = tracker.records[0]
    assert found["time/model_flops"] == pytest.approx(3 * 2 * 32 * found["time/images_per_second"])
    assert "time/peak_gpu_gib" not in found


def test_the_steps_of_a_window_are_traced(tmp_path: Path) -> None:
    for window, first in (([2, 4], 0), ([0, 1], 0), ([1, 3], 2), ([], 0)):
        profiled = ProfileWindow(window, tmp_path, step=first)
        for step in range(first, 5):
            torch.full((step + 1,), 1.0).cos()  # of step + 1 numbers
            profiled.before(step + 1)
    assert {path.name for path in tmp_path.iterdir()} == {"profile-2-4.json.gz", "profile-0-1.json.gz"}
    trace = json.loads(gzip.decompress((tmp_path / "profile-2-4.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::cos" for event in trace["traceEvents"]) == 2


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiled = ProfileWindow([0, 1], tmp_path / "missing", step=0)
    profiled.before(1)
    assert "profile-0-1.json.gz cannot be written" in caplog.text

"""Metrics of the machine beside a run: real readings, in the background, and never in training's way."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import NumericsError
from pipeline.tracking import open_tracker, system
from pipeline.tracking.system import monitored
from pipeline.tracking.tracker import NullTracker

JSONL = TrackingConfig(backend="jsonl", experiment="unit")


def recorded(folder: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["metrics"])
        for line in lines
        if "step" in line and any(key.startswith("system/") for key in line["metrics"])
    ]


def test_the_machine_is_measured_at_the_step_that_training_is_at(tmp_path: Path) -> None:
    with open_tracker(JSONL, output_dir=tmp_path, run_name="demo") as tracker:
        tracker.resume_from(7)
        with monitored(tracker, every_seconds=0.3):
            deadline = time.monotonic() + 20
            while not recorded(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            tracker.log_metrics({"train/loss": 0.5}, step=9)
            ballast = bytearray(300_000_000)
            ballast[:: 1 << 12] = b"\1" * len(ballast[:: 1 << 12])  # every page is used
            before = len(recorded(tmp_path))
            while len(recorded(tmp_path)) < before + 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        del ballast
        assert not [thread for thread in threading.enumerate() if thread.name == "system metrics"]
    (first, of_first), *_, (last, of_last) = recorded(tmp_path)
    assert (first, last) == (7, 9)
    assert of_last["system/process_memory_megabytes"] - of_first["system/process_memory_megabytes"] > 200
    assert 0 <= of_last["system/cpu_utilization_percentage"] <= 100
    assert 0 < of_last["system/system_memory_usage_percentage"] < 100


def test_a_run_of_a_second_has_one_record_and_0_seconds_have_none(tmp_path: Path) -> None:
    for every_seconds, folder in ((3600.0, tmp_path / "short"), (0.0, tmp_path / "off")):
        with (
            open_tracker(JSONL, output_dir=folder, run_name="demo") as tracker,
            monitored(tracker, every_seconds=every_seconds),
        ):
            tracker.log_metrics({"train/loss": 0.5}, step=0)
    assert len(recorded(tmp_path / "short")) == 1 and not recorded(tmp_path / "off")
    with monitored(NullTracker(), every_seconds=0.01):
        assert "system metrics" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_training_passes_and_the_thread_ends(tmp_path: Path) -> None:
    with (
        pytest.raises(NumericsError),
        open_tracker(JSONL, output_dir=tmp_path, run_name="demo") as tracker,
        monitored(tracker, every_seconds=0.01),
    ):
        raise NumericsError("loss is NaN")
    assert not recorded(tmp_path)  # no step was done: the folder may be used again
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["status"] == "FAILED"


def test_what_a_gpu_does_not_report_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a share of a GPU: no utilisation. The numbers stand in for a GPU, which this machine may lack."""

    class NVMLError(Exception): ...

    def refuse(_: object) -> None:
        raise NVMLError("Not Supported")

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=20_000_000_000, total=80_000_000_000),
        nvmlDeviceGetUtilizationRates=refuse,
        nvmlDeviceGetPowerUsage=lambda _: 350_500,
    )
    monkeypatch.setattr(system, "_open_gpus", lambda _: [(library, "first")])
    with contextlib.ExitStack() as held:
        sample = system.sampler(held)()
    assert {key: value for key, value in sample.items() if "gpu" in key} == {
        "system/gpu_0_memory_usage_megabytes": 20_000,
        "system/gpu_0_memory_usage_percentage": 25,
        "system/gpu_0_power_usage_watts": 350.5,
    }

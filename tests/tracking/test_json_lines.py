"""metrics.jsonl: what is written, by which rank, and what survives a kill. Without MLflow."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.config.schema import TrackingConfig
from pipeline.errors import NumericsError, Preempted, WriteError
from pipeline.redaction import REDACTED
from pipeline.tracking import open_tracker
from pipeline.tracking.journal import Acknowledged, Journal, read_batch
from pipeline.tracking.tracker import flatten_params

JSONL = TrackingConfig(backend="jsonl", experiment="unit")


def records(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records(folder)]


def test_one_line_per_call(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("top-1")
    with open_tracker(JSONL, output_dir=tmp_path, run_name="demo") as tracker:
        tracker.log_params({"seed": 1, "plan": {"cycles": 3, "phases": [{"name": "explore"}, {"name": "refine"}]}})
        tracker.log_metrics({"train/loss": 0.5, "mask/r_s": float("nan")}, step=50)
        tracker.log_child("ticket-0", {"density": 0.1}, {"eval/top1": 0.9})
        source = "s3://me:hunter2@host/train.beton"
        tracker.log_input("mine/train", digest="0a", context="training", source=source, profile={"num_rows": 6})
        tracker.log_artifact(tmp_path / "table.txt")
        run_id = tracker.run_id
    assert without_time(tmp_path) == [
        {"run": run_id, "name": "demo", "experiment": "unit"},
        {"params": {"seed": "1", "plan.cycles": "3", "plan.phases.0.name": "explore", "plan.phases.1.name": "refine"}},
        {"step": 50, "metrics": {"train/loss": 0.5, "mask/r_s": "nan"}},
        {"child": "ticket-0", "params": {"density": "0.1"}, "metrics": {"eval/top1": 0.9}},
        {
            "input": "mine/train",
            "digest": "0a",
            "context": "training",
            "source": "s3://me:[redacted]@host/train.beton",
            "profile": {"num_rows": 6},
        },
        {"artifact": "table.txt"},
        {"status": "FINISHED"},
    ]
    times = [record["time"] for record in records(tmp_path)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (NumericsError("loss is NaN"), {"status": "FAILED"}),
        (Preempted("asked to stop"), {"tags": {"preempted": "true"}}),
    ],
)
def test_an_exception_decides_how_the_run_ends(tmp_path: Path, error: Exception, last: dict[str, Any]) -> None:
    with pytest.raises(type(error)), open_tracker(JSONL, output_dir=tmp_path, run_name="demo"):
        raise error
    assert without_time(tmp_path)[-1] == last


def test_resume_appends_and_says_so(tmp_path: Path) -> None:
    with open_tracker(JSONL, output_dir=tmp_path, run_name="demo") as tracker:
        tracker.log_metrics({"train/loss": 1.0}, step=10)
        run_id = tracker.run_id
    with open_tracker(JSONL, output_dir=tmp_path, run_name="demo", resume_run_id=run_id) as tracker:
        tracker.resume_from(5)
        tracker.log_metrics({"train/loss": 1.0}, step=10)
        assert tracker.run_id == run_id
    kinds = [record.get("resumed_from_step", record.get("step")) for record in records(tmp_path)]
    assert kinds == [None, 10, None, None, 5, 10, None]


def test_secrets_are_redacted() -> None:
    params = {
        "tracking": {"uri": "postgresql://me:hunter2@db:5432/mlflow", "password": "hunter2"},
        "data": {"api_key": "hunter2", "credentials": {"user": "me", "key": "hunter2"}},
        "mirrors": [{"access-token": "hunter2"}],
        "keys": ["hunter"],
    }
    flat = flatten_params(params)
    assert "hunter2" not in json.dumps(flat)
    assert flat["tracking.uri"] == f"postgresql://me:{REDACTED}@db:5432/mlflow"
    assert flat["data.credentials"] == flat["mirrors.0.access-token"] == REDACTED
    assert flat["keys"] == "['hunter']"


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"step": 1, "metrics": {"train/loss": 1.0}, "time": 1.0})
    journal.close()
    with journal.path.open("a") as file:
        file.write('{"step": 2, "metr')  # killed here
    batch, offset = read_batch(journal.path, 0, max_metrics=1000)
    assert [record["step"] for record in batch] == [1]  # a line without its end may still be growing
    journal = Journal(tmp_path)
    journal.append({"step": 3, "metrics": {"train/loss": 1.0}, "time": 3.0})
    journal.close()
    batch, offset = read_batch(journal.path, offset, max_metrics=1000)
    assert [record["step"] for record in batch] == [3]
    assert offset == journal.path.stat().st_size


@pytest.mark.parametrize(
    "damaged",
    [
        {"step": 5},
        {"step": "5", "metrics": {}, "time": 1.0},
        {"step": 5, "metrics": {"train/loss": None}, "time": 1.0},
        {"step": 5, "metrics": {"train/loss": 1.0}},
        {"run": "a", "time": 1.0},
        {"child": "ticket-0", "params": {"a": 1}, "metrics": {}, "time": 1.0},
        {"tags": ["a"]},
        {"input": "mine/train", "digest": "0a", "context": "training", "source": "here", "profile": None},
        {"status": "FINISHED"},
    ],
)
def test_a_damaged_line_that_is_still_json_is_skipped_with_a_warning(
    damaged: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    after = {"step": 6, "metrics": {"train/loss": 1.0, "mask/r_s": "nan"}, "time": 1.0}
    for record in (damaged, after):
        journal.append(record)
    journal.close()
    assert read_batch(journal.path, 0, max_metrics=1000) == ([after], journal.path.stat().st_size)
    assert "an unfinished or damaged line of" in caplog.text


@pytest.mark.parametrize("field", ['"num_bytes": "9"', '"num_bytes": -1', '"last_step": null', '"what": 1'])
def test_a_damaged_note_of_what_was_sent_only_sends_again(field: str, tmp_path: Path) -> None:
    note = tmp_path / "metrics.sent.json"
    note.write_text('{"uri": "", "num_bytes": 0}')
    assert Acknowledged.load(tmp_path) is None  # nothing was ever sent of a journal that is not there
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert Acknowledged.load(tmp_path) is not None
    note.write_text(f'{{"uri": "", {field}}}')
    assert Acknowledged.load(tmp_path) is None


def test_batches_hold_metrics_up_to_the_limit_or_one_other_record(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append({"step": step, "metrics": {"train/loss": 1.0, "train/top1": 0.5}, "time": 1.0})
    journal.append({"status": "FINISHED", "time": 1.0})
    journal.close()
    sizes, offset = [], 0
    while True:
        batch, end = read_batch(journal.path, offset, max_metrics=4)
        if end == offset:
            break
        sizes.append(len(batch))
        offset = end
    assert sizes == [2, 2, 1, 1]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        open_tracker(JSONL, output_dir=tmp_path, run_name="first"),
        pytest.raises(WriteError, match="another process is writing to it"),
    ):
        open_tracker(JSONL, output_dir=tmp_path, run_name="second")
    open_tracker(JSONL, output_dir=tmp_path, run_name="second").close()


def test_a_full_disk_is_a_write_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    tracker = open_tracker(JSONL, output_dir=tmp_path, run_name="demo")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    old_limits, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old_limits[1]))  # the kernel then writes 10 bytes and no more
    try:
        with pytest.raises(WriteError, match=r"metrics\.jsonl: no space: \d\d bytes needed, \d+ free"):
            tracker.log_metrics({"train/loss": 1.0}, step=1)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    tracker.log_metrics({"train/loss": 1.0}, step=2)
    tracker.close()
    assert without_time(tmp_path)[1] == {"step": 2, "metrics": {"train/loss": 1.0}}


def _log_from(rank: int, folder: str) -> None:
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    with open_tracker(JSONL, output_dir=Path(folder) / "run", run_name=f"rank-{rank}") as tracker:
        tracker.log_metrics({"train/loss": float(rank)}, step=rank)
        assert bool(tracker.run_id) == (rank == 0)
        dist.barrier()
    dist.destroy_process_group()


def test_only_the_main_rank_logs(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_log_from, [(rank, str(tmp_path)) for rank in range(2)], chunksize=1)
    assert [record.get("name", record.get("step")) for record in records(tmp_path / "run")] == ["rank-0", 0, None]


def test_backend_none_writes_nothing(tmp_path: Path) -> None:
    with open_tracker(TrackingConfig(backend="none"), output_dir=tmp_path / "run", run_name="demo") as tracker:
        tracker.log_metrics({"train/loss": 1.0}, step=1)
        tracker.log_child("dense", {}, {"eval/top1": 0.9})
    assert not (tmp_path / "run").exists()


def test_mlflow_is_not_imported_without_need() -> None:
    code = "import pipeline.tracking, pipeline.tracking.tracker, sys; "
    code += "sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Runs of separate databases, or of none, are copied into one view; what is copied stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ConfigError
from pipeline.tracking import open_tracker, ui
from pipeline.tracking.local_view import copy_runs
from pipeline.tracking.place import RecordedRun
from pipeline.tracking.spooled import replay

JSONL = TrackingConfig(backend="jsonl", experiment="mine")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of different experiments; the second was sent to a server, and its last line is torn."""
    folder = tmp_path_factory.mktemp("runs")
    for name, accuracy in (("set", 0.7), ("rigl", 0.8)):
        config = TrackingConfig(backend="jsonl", experiment=f"of {name}")
        (folder / name / "report").mkdir(parents=True)
        (folder / name / "report" / "table.txt").write_text(f"top-1 {accuracy}")
        with open_tracker(config, output_dir=folder / name, run_name=name) as tracker:
            for step in range(3):
                tracker.log_metrics({"val/top1": accuracy * step / 2}, step=step)
            if name == "rigl":  # the other is as version 0.1 left it
                tracker.log_metrics({"eval/last_ticket_top1": accuracy}, step=3)
            metrics = {"eval/top1": accuracy, "eval/nll": 0.5, "eval/ece": 0.1}
            tracker.log_child("ticket-0", {"kind": "ticket", "num_members": 1}, metrics)
            tracker.log_artifact(folder / name / "report")
    sent = {"uri": "http://127.0.0.1:9", "run_id": "abc", "run": "pending-1", "experiment_id": "7", "num_bytes": 10}
    (folder / "rigl" / "metrics.sent.json").write_text(json.dumps(sent))
    with (folder / "rigl" / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 4, "metr')
    return folder


def test_a_view_has_both_runs_in_one_experiment_and_changes_neither(folder: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    before = contents(folder)
    names = ("set", "rigl")
    runs = copy_runs([folder / name for name in names], tmp_path)
    assert contents(folder) == before
    assert len({run.experiment_id for run in runs}) == 1 and {run.uri for run in runs} == {runs[0].uri}
    client = MlflowClient(tracking_uri=runs[0].uri)
    for name, run, accuracy in zip(names, runs, (0.7, 0.8), strict=True):
        found = client.get_run(run.run_id)
        assert (found.info.run_name, found.data.metrics["eval/last_ticket_top1"]) == (name, accuracy)
        assert ("eval/best_ticket_nll" in found.data.metrics) == (name == "set")
        points = [(point.step, point.value) for point in client.get_metric_history(run.run_id, "val/top1")]
        assert sorted(points) == [(0, 0.0), (1, accuracy / 2), (2, accuracy)]
        assert [each.path for each in client.list_artifacts(run.run_id, "report")] == ["report/table.txt"]
        children = client.search_runs([run.experiment_id], f"tags.mlflow.parentRunId = '{run.run_id}'")
        assert [child.info.run_name for child in children] == [f"ticket-0 of {name}"]


def test_a_run_on_a_server_is_opened_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ui.webbrowser, "open", opened.append)
    assert ui.show([folder / "rigl"], compares=False, opens_browser=True) == 0
    assert opened == ["http://127.0.0.1:9/#/experiments/7/runs/abc?workflowType=machine_learning"]
    assert opened[0] in capsys.readouterr().out


def test_addresses_name_runs_and_page() -> None:
    runs = [RecordedRun("sqlite:////a", "x1", "7"), RecordedRun("sqlite:////a", "y2", "8")]
    assert ui.charts_page("http://h:1", runs).endswith(
        "searchFilter=attributes.run_id%20IN%20%28%27x1%27%2C%20%27y2%27%29"
    )
    assert ui.table_page("http://h:1", runs) == (
        "http://h:1/#/compare-runs?runs=%5B%22x1%22%2C%20%22y2%22%5D&experiments=%5B%227%22%2C%20%228%22%5D"
    )


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        ui.show([tmp_path], compares=True, opens_browser=False)
    with pytest.raises(ConfigError, match="nowhere: does not exist; do: pass the output_dir of a run"):
        replay(tmp_path / "nowhere")

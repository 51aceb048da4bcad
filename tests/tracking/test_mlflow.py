"""MLflow behind the journal: SQLite stores, a real server, and servers that are dead, silent or lose their answers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ConfigError, Preempted, ServiceError
from pipeline.tracking import PARENT_RUN, open_tracker
from pipeline.tracking.__main__ import main
from pipeline.tracking.journal import count_records
from pipeline.tracking.spooled import replay
from pipeline.tracking.tracker import PENDING, Tracker

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

SQLITE = TrackingConfig(backend="mlflow", experiment="unit")


def store(folder: Path) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.resolve()}/mlflow.db")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store(folder).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path: Path, empty_store: Path) -> Path:
    """A run's folder with an initialised SQLite store, copied because MLflow takes seconds to make one."""
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def runs(client: MlflowClient) -> dict[str, Run]:
    """Return the runs of the experiment by name; a duplicate name is an error."""
    experiment = client.get_experiment_by_name("unit")
    found = client.search_runs([experiment.experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), [run.info.run_name for run in found]
    return named


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float, int]]:
    """Return (step, value, time in milliseconds), sorted by step."""
    return sorted((point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points_on_disk(folder: Path, key: str) -> list[tuple[int, float, int]]:
    return [
        (line["step"], line["metrics"][key], round(line["time"] * 1000))
        for line in lines(folder)
        if key in line.get("metrics", {}) and "step" in line
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last):
        tracker.log_metrics({"train/loss": 1 / (step + 1), "time/data_seconds": 0.25}, step=step)


def test_sqlite_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "table.txt").write_text("ticket-0 0.9")
    config = TrackingConfig(
        backend="mlflow", experiment="unit", required=True
    )  # waits for a store that is slow to make
    with open_tracker(config, output_dir=folder, run_name="demo") as tracker:
        assert not tracker.run_id.startswith(PENDING)
        tracker.log_params({"seed": 1, "model": {"name": "resnet50"}, "aws_secret_access_key": "hunter2"})
        tracker.log_params({f"layer.{index}.density": 0.1 for index in range(150)})  # more than MLflow takes at once
        log_steps(tracker, 0, 600)  # 1,200 points: more than MLflow takes at once
        tracker.log_metrics({"mask/r_s": float("nan")}, step=7)
        tracker.log_child("ticket-0", {"density": 0.1}, {"eval/top1": 0.90, "eval/nll": 0.5})
        tracker.log_child("superposition-mean", {"density": 0.1}, {"eval/top1": 0.92, "eval/nll": 0.4})
        tracker.log_child("ticket-0", {"density": 0.1, "cycle": 0}, {"eval/top1": 0.91})
        tracker.log_artifact(folder / "report")
        tracker.set_tags({"host": "here", "mlflow.user": "somebody"})
        for name, context in (("images/train", "training"), ("images/val", "evaluation"), ("images/val", "evaluation")):
            tracker.log_input(
                name, digest=f"{context:e<64}", context=context, source=f"/data/{name}.beton", profile={"num_rows": 6}
            )
        run_id = tracker.run_id
    client = store(tmp_path)
    named = runs(client)
    parent = named.pop("demo")
    assert parent.info.run_id == run_id
    assert parent.info.status == "FINISHED"
    assert len(parent.data.params) == 153
    assert parent.data.params["model.name"] == "resnet50"
    assert parent.data.params["aws_secret_access_key"] == "[redacted]"
    assert b"hunter2" not in (tmp_path / "mlflow.db").read_bytes() + (folder / "metrics.jsonl").read_bytes()
    assert parent.data.tags["host"] == "here"
    assert parent.data.tags["mlflow.user"] == "somebody"
    inputs = {each.dataset.name: (each.dataset, each.tags[0].value) for each in parent.inputs.dataset_inputs}
    assert {name: context for name, (_, context) in inputs.items()} == {
        "images/train": "training",
        "images/val": "evaluation",
    }
    dataset, _ = inputs["images/train"]
    assert dataset.digest == f"{'training':e<16}" and json.loads(dataset.profile) == {"num_rows": 6}
    assert json.loads(dataset.source) == {"uri": "/data/images/train.beton"}
    experiment = client.get_experiment_by_name("unit")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert points(client, run_id, "train/loss") == points_on_disk(folder, "train/loss")
    assert str(points(client, run_id, "mask/r_s")[0][1]) == "nan"
    assert sorted(named) == ["superposition-mean of demo", "ticket-0 of demo"]
    assert "**ticket-0** of the run **demo**" in named["ticket-0 of demo"].data.tags["mlflow.note.content"]
    assert {child.data.tags["mlflow.parentRunId"] for child in named.values()} == {run_id}
    assert {child.info.status for child in named.values()} == {"FINISHED"}
    assert named["ticket-0 of demo"].data.metrics == {"eval/top1": 0.91, "eval/nll": 0.5}
    assert named["ticket-0 of demo"].data.params == {"density": "0.1", "cycle": "0"}
    copied = tmp_path / "mlartifacts" / run_id / "artifacts" / "report" / "table.txt"
    assert copied.read_text() == "ticket-0 0.9"
    assert (
        count_records(folder / "metrics.jsonl", json.loads((folder / "metrics.sent.json").read_text())["num_bytes"])
        == 0
    )


def test_resume_continues_the_run_without_doubling_its_points(folder: Path) -> None:
    with contextlib.suppress(Preempted), open_tracker(SQLITE, output_dir=folder, run_name="demo") as tracker:
        tracker.log_params({"seed": 1})
        tracker.log_child("ticket-0", {}, {"eval/top1": 0.9})
        log_steps(tracker, 0, 20)
        tracker.log_metrics({"eval/ensemble_top1": 0.7}, step=19)
        run_id = tracker.run_id
        raise Preempted("asked to stop")
    client = store(folder)
    before = client.get_run(run_id)
    assert (before.info.status, before.data.tags["preempted"]) == ("RUNNING", "true")

    with open_tracker(SQLITE, output_dir=folder, run_name="demo", resume_run_id=run_id) as tracker:
        assert tracker.run_id == run_id
        tracker.resume_from(15)  # the checkpoint is older than the last point
        tracker.log_params({"seed": 2, "added": True})
        log_steps(tracker, 15, 30)
        tracker.log_metrics({"val/top1": 0.8}, step=16)  # not reported before the stop
        tracker.log_metrics({"eval/ensemble_top1": 0.75}, step=19)  # evaluated again, with another setting
        tracker.log_child("ticket-0", {}, {"eval/top1": 0.9})
    after = runs(client)
    assert sorted(after) == ["demo", "ticket-0 of demo"]
    assert (after["demo"].info.run_id, after["demo"].info.status) == (run_id, "FINISHED")
    assert after["demo"].data.params == {"seed": "1", "added": "True"}
    assert after["demo"].data.tags["resumed_from_step"] == "15"
    assert after["demo"].data.tags["preempted"] == "false"
    assert [step for step, _, _ in points(client, run_id, "train/loss")] == list(range(30))
    assert [step for step, _, _ in points(client, run_id, "val/top1")] == [16]
    assert after["demo"].data.metrics["eval/ensemble_top1"] == 0.75
    assert [line["step"] for line in lines(folder) if "step" in line] == [*range(20), 19, *range(15, 30), 16, 19]


def test_runs_are_children_of_the_run_that_a_variable_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a sweep; its own records may still be on the way, so that it has no id of the server yet."""
    waiting = PENDING + 32 * "a"
    with open_tracker(SQLITE, output_dir=folder / "known", run_name="known") as parent:
        for number, named in enumerate((parent.run_id, waiting)):
            monkeypatch.setenv(PARENT_RUN, named)
            open_tracker(SQLITE, output_dir=folder / f"{number}", run_name=f"run-{number}").close()
            monkeypatch.delenv(PARENT_RUN)
    late = open_tracker(SQLITE, output_dir=folder / "late", run_name="late", resume_run_id=waiting)
    late.close()
    tags = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs(store(folder)).items()}
    assert tags.pop("run-0") == parent.run_id and tags.pop("run-1") == late.run_id
    assert len(tags) == 2 and set(tags.values()) == {None}


def test_everything_sent_again_changes_nothing(folder: Path) -> None:
    """As after a kill between the server's answer and the record of it, at any point of the run."""
    with open_tracker(SQLITE, output_dir=folder, run_name="demo") as tracker:
        tracker.log_params({"seed": 1})
        log_steps(tracker, 0, 10)
        tracker.log_child("dense", {"density": 1.0}, {"eval/top1": 0.95})
    client = store(folder)
    (folder / "metrics.sent.json").unlink()
    assert main(["replay", str(folder)]) == 0
    assert sorted(runs(client)) == ["demo", "dense of demo"]
    assert points(client, tracker.run_id, "train/loss") == points_on_disk(folder, "train/loss")
    assert len(points(client, runs(client)["dense of demo"].info.run_id, "eval/top1")) == 1


def test_two_runs_in_one_folder_stay_two_runs(folder: Path) -> None:
    """Also, a run that was tracked without MLflow can be sent to it later."""
    for name in ("first", "second"):
        with open_tracker(
            TrackingConfig(backend="jsonl", experiment="unit"), output_dir=folder, run_name=name
        ) as tracker:
            log_steps(tracker, 0, 5)
            tracker.log_child(f"ticket-of-{name}", {}, {"eval/top1": 0.9})
    assert replay(folder) == 16
    client = store(folder)
    named = runs(client)
    for name in ("first", "second"):
        run_id = named[name].info.run_id
        assert [step for step, _, _ in points(client, run_id, "train/loss")] == list(range(5))
        assert named[f"ticket-of-{name} of {name}"].data.tags["mlflow.parentRunId"] == run_id


def test_a_dead_server_costs_one_warning_and_replay_delivers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead = TrackingConfig(backend="mlflow", experiment="unit", uri=f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with open_tracker(dead, output_dir=folder, run_name="demo") as tracker:
        assert time.monotonic() - started < 10
        key = tracker.run_id
        assert key.startswith(PENDING)
        started = time.monotonic()
        log_steps(tracker, 0, 1000)
        assert time.monotonic() - started < 1
        tracker.log_child("ticket-0", {"density": 0.1}, {"eval/top1": 0.9})
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings
    assert (
        f"MLflow at {dead.uri} is not accepting records ([Errno 111] Connection refused): training continues"
        in warnings[0]
    )
    assert f"1003 records have not reached MLflow at {dead.uri}" in warnings[1]
    assert f"python -m pipeline.tracking replay {folder}" in warnings[1]

    command = [sys.executable, "-m", "pipeline.tracking", "replay", str(folder)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 69
    assert refused.stderr.startswith("ERROR[69] 1003 of 1003 records could not be sent")
    assert len(refused.stderr.splitlines()) == 1
    uri = f"sqlite:///{folder}/mlflow.db"
    assert [replay(folder, uri=uri) for _ in range(2)] == [1003, 0]
    client = store(folder)
    assert sorted(runs(client)) == ["demo", "ticket-0 of demo"]
    assert runs(client)["demo"].info.status == "FINISHED"
    assert points(client, runs(client)["demo"].info.run_id, "train/loss") == points_on_disk(folder, "train/loss")

    # the checkpoint only knows the name that the tracker gave the run itself: it finds the run all the same
    healthy = TrackingConfig(backend="mlflow", experiment="unit", uri=uri)
    with open_tracker(healthy, output_dir=folder, run_name="demo", resume_run_id=key) as tracker:
        assert tracker.run_id == runs(client)["demo"].info.run_id


def test_required_makes_a_dead_server_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match="is not accepting records") as caught:
        open_tracker(TrackingConfig(backend="mlflow", uri=uri, required=True), output_dir=tmp_path, run_name="demo")
    assert not caplog.records  # one line is enough
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in (tmp_path / "metrics.sent.json").read_text()


def test_an_address_that_cannot_work_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: expected a URI, got 'mlruns'"):
        open_tracker(TrackingConfig(backend="mlflow", uri="mlruns"), output_dir=tmp_path, run_name="demo")


def test_a_silent_server_keeps_nobody_waiting(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        tracker = open_tracker(
            TrackingConfig(backend="mlflow", experiment="unit", uri=uri), output_dir=folder, run_name="demo"
        )
        assert time.monotonic() - started < 10
        started = time.monotonic()
        log_steps(tracker, 0, 1000)
        assert time.monotonic() - started < 1
        started = time.monotonic()
        tracker.close()
        assert time.monotonic() - started < 15
    assert main(["replay", str(folder), "--uri", f"sqlite:///{folder}/mlflow.db"]) == 0
    client = store(folder)
    assert points(client, runs(client)["demo"].info.run_id, "train/loss") == points_on_disk(folder, "train/loss")


class Relay:
    """A TCP relay to a server that can be cut, or lose answers to requests that contain ``swallow``."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_cut = False
        self.swallow = b""
        self.num_swallowed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_cut:
                    client.close()
                else:
                    threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Relay alternately: MLflow's client sends the next request after the answer to the last."""
        with client, socket.create_connection(("127.0.0.1", self._target)) as server, contextlib.suppress(OSError):
            is_swallowing = False
            threading.Thread(target=lambda: self._return(server, client, lambda: is_swallowing), daemon=True).start()
            while request := client.recv(1 << 20):
                if self.is_cut:
                    return
                is_swallowing = is_swallowing or bool(self.swallow and self.swallow in request)
                server.sendall(request)

    def _return(self, server: socket.socket, client: socket.socket, is_swallowing: Callable[[], bool]) -> None:
        with contextlib.suppress(OSError):
            while answer := server.recv(1 << 20):
                if is_swallowing():
                    self.num_swallowed += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(answer)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module", autouse=True)
def server_port(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[int]:
    """A real `mlflow server`. It takes 15 s to start, so it starts while the other tests run."""
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    yield port
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture
def relay(server_port: int) -> Iterator[Relay]:
    """A relay to the server, once the server answers."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server_port}/health", timeout=5):
            break
        assert time.monotonic() < deadline, "mlflow server does not start"
        time.sleep(0.3)
    relay = Relay(server_port)
    yield relay
    relay.close()


def test_a_real_server_with_outages_gets_everything_once(
    relay: Relay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    caplog.set_level(logging.INFO, logger="pipeline")
    folder = tmp_path / "run"
    config = TrackingConfig(backend="mlflow", experiment="unit", uri=relay.uri)

    def num_messages(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    relay.swallow = b"runs/create"  # the run is created, but the answer is lost
    with open_tracker(config, output_dir=folder, run_name="demo") as tracker:
        wait_until(lambda: num_messages("is not accepting records") == 1)
        assert tracker.run_id.startswith(PENDING)
        relay.swallow = b""
        log_steps(tracker, 0, 10)
        tracker.flush()
        wait_until(lambda: num_messages("is responding again") == 1)
        run_id = tracker.run_id
        relay.swallow = b"runs/log-batch"  # the points arrive, but the answer is lost
        log_steps(tracker, 10, 20)
        tracker.flush()
        wait_until(lambda: num_messages("is not accepting records") == 2)
        relay.swallow, relay.is_cut = b"", True
        log_steps(tracker, 20, 30)
        tracker.flush()
        relay.is_cut = False
        tracker.log_params({"tracking": {"uri": ""}, "tickets": [], "note": None})
        tracker.log_metrics({"mask/r_s": float("inf")}, step=30)
        tracker.log_child("ticket-0", {"density": 0.1}, {"eval/top1": 0.9})
        tracker.log_child("dense", {"density": 1.0}, {"eval/top1": 0.95})
        (folder / "table.txt").write_text("top-1")
        tracker.log_artifact(folder / "table.txt")
    assert relay.num_swallowed >= 2
    assert (
        num_messages("is not accepting records") == num_messages("is responding again") == 2
    )  # two outages, one warning each

    client = MlflowClient(tracking_uri=relay.uri)
    named = runs(client)
    assert sorted(named) == ["demo", "dense of demo", "ticket-0 of demo"]
    assert named["demo"].info.run_id == run_id
    assert points(client, run_id, "train/loss") == points_on_disk(folder, "train/loss")
    assert {named[f"{child} of demo"].data.tags["mlflow.parentRunId"] for child in ("dense", "ticket-0")} == {run_id}
    assert named["demo"].data.params == {"tracking.uri": "", "tickets": "[]", "note": "None"}
    assert named["dense of demo"].data.metrics == {"eval/top1": 0.95}
    with urllib.request.urlopen(f"{relay.uri}/get-artifact?path=table.txt&run_uuid={run_id}", timeout=10) as answer:
        assert answer.read() == b"top-1"

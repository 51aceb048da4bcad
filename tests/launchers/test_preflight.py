"""The checks before a run: one line each, and the exit code of the most informative failure."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from launchers import preflight, run
from pipeline.distributed import machine
from tests.campaigns.cases import Good, make_good


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "JOB_COMPLETION_INDEX",
        "SLURM_NODEID",
        "WORLD_SIZE",
        "KUBERNETES_SERVICE_HOST",
        "MLFLOW_TRACKING_URI",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Twelve images of three classes, and a configuration of a short run on them, in batches of four."""
    made = make_good(tmp_path_factory.mktemp("good"))
    shutil.rmtree(made.root / "run")
    return made


def checked(good: Good, *overrides: str, options: tuple[str, ...] = ("--nproc-per-node", "2")) -> int:
    arguments = ["--", "launchers/train.py", "--config", str(good.config), *overrides]
    return preflight.check_all(preflight.parse([*options, *arguments]))


def test_every_check_is_one_line_and_nothing_stays(good: Good, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(good.root.rglob("*"))
    assert checked(good, "train.device=cpu") == 0
    output = capsys.readouterr()
    assert [line.split(": ")[:2] for line in output.out.splitlines()] == [["ok", name] for name in preflight.CHECKS]
    assert "small, 1 node × 2 ranks, 21 steps of 4 images" in output.out
    assert "12 images to train on, 12 to evaluate on, 3 classes" in output.out
    assert output.err == ""
    assert sorted(good.root.rglob("*")) == before


@pytest.mark.parametrize(("nodes", "ranks"), [("1", "3"), ("3", "8")])
def test_a_number_of_ranks_that_does_not_divide_the_batch_ends_in_seconds(
    good: Good, capsys: pytest.CaptureFixture[str], nodes: str, ranks: str
) -> None:
    options = ("--nnodes", nodes, "--nproc-per-node", ranks, "--master-addr", "127.0.0.1")
    assert checked(good, options=options) == 64
    output = capsys.readouterr()
    num = int(nodes) * int(ranks)
    assert output.out == ""  # nothing else can be judged
    assert output.err == (
        f"ERROR[64] configuration: train.global_batch: 4 samples cannot be divided evenly among {num} ranks × 1 "
        f"micro-batches; do: choose a multiple of {num}, or another number of ranks\n"
    )


def test_data_is_checked_where_it_is_staged_from(
    good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_yet = [f"data.train={tmp_path}/train.beton", f"data.val={tmp_path}/val.beton"]
    source = ("--nproc-per-node", "1", "--data-from", str(good.root / "data"))
    assert checked(good, *not_yet, options=source) == 0
    assert f"3 classes, in {good.root}/data" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

    empty = ("--nproc-per-node", "1", "--data-from", str(tmp_path))
    assert checked(good, *not_yet, options=empty) == 65
    output = capsys.readouterr()
    assert output.err.startswith("ERROR[65] data: ") and "train.beton" in output.err and output.err.count("\n") == 1
    assert "ok: output_dir" in output.out  # the other checks are made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(good: Good, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(good, "train.device=cuda") == 69
    assert "ERROR[69] devices: no GPU can be used: torch " in capsys.readouterr().err


def test_too_few_gpus_are_named(
    good: Good, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.distributed import device

    monkeypatch.setattr(device, "choose", lambda *_: device.Choice("cuda", "H200 (139 GiB)", "driver 580.1"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert checked(good) == 69
    assert "torch can use 1 GPUs on this node, expected 2, one for each rank" in capsys.readouterr().err
    assert checked(good, "train.backend=gloo") == 0
    assert "ok: devices: 2 ranks, 1 × H200 (139 GiB), driver 580.1" in capsys.readouterr().out


def test_storage_is_written(good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert checked(good, f"output_dir={tmp_path}/file/run") == 73
    assert "ERROR[73] output_dir: " in capsys.readouterr().err


def test_little_shared_memory_is_a_warning(
    good: Good, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY_BYTES", 1 << 60)
    assert checked(good) == 0
    assert "warning: shared memory: " in capsys.readouterr().out
    assert checked(good, options=("--nproc-per-node", "1")) == 0
    assert "ok: shared memory: " in capsys.readouterr().out


def test_a_name_that_does_not_resolve_ends_it(good: Good, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "train-0.nowhere.invalid")
    assert checked(good, options=options) == 64
    assert "ERROR[64] names: environment: --master-addr 'train-0.nowhere.invalid' does not resolve" in (
        capsys.readouterr().err
    )


def test_in_kubernetes_a_pod_without_an_address_is_waited_for_later(
    good: Good, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "train-0.nowhere.invalid")
    assert checked(good, options=options) == 0  # so that a pod that is not placed yet costs the others no restart
    assert "warning: names: train-0.nowhere.invalid has no address yet" in capsys.readouterr().out


def test_the_most_informative_code_of_several_failures(
    good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    missing = ["data.train=/nowhere/train.beton", "data.train_samples=12", f"output_dir={tmp_path}/file/run"]
    assert checked(good, *missing) == 65
    assert [line[:9] for line in capsys.readouterr().err.splitlines()] == ["ERROR[65]", "ERROR[73]"]


class Health(BaseHTTPRequestHandler):
    """Answers ``/health`` as MLflow does; anything else is forbidden, as for a host that it does not allow."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 403)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Health) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


def test_mlflow_that_does_not_respond_is_a_warning(good: Good, server: int, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"127.0.0.1:{server}"
    for address, expected in (
        (f"http://user:hunter2secret@{place}", f"ok: MLflow: http://{place} responds"),
        (f"http://{place}/other", "warning: MLflow: http://127.0.0.1:.*/other does not respond .status 403."),
        ("http://127.0.0.1:1", "warning: MLflow: http://127.0.0.1:1 does not respond .*refused.*: training goes on"),
    ):
        uri = ["tracking.backend=mlflow", f"tracking.uri={address}"]
        assert checked(good, *uri) == 0
        output = capsys.readouterr().out
        (line,) = (line for line in output.splitlines() if ": MLflow: " in line)
        assert re.match(expected, line), line
        assert "hunter2secret" not in output


def test_its_options_are_those_of_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--nnodes", "4", "--nproc-per-node", "8", "--master-addr", "train-0.train", "--shutdown-timeout", "120"]
    command += ["--", "launchers/train.py", "--config", "a"]
    ours, theirs = vars(preflight.parse(command)), vars(run.parse(command))
    assert {name: value for name, value in ours.items() if name != "data_from"} == theirs
    for arguments, expected in (
        (["--", "x.py"], "expected launchers/train.py and its arguments after --, got 'x.py'"),
        (["--nnodes", "2", "--", "launchers/train.py"], "more than one node needs --master-addr"),
    ):
        monkeypatch.setattr(sys, "argv", ["launchers.preflight", *arguments])
        assert preflight.main() == 64
        error = capsys.readouterr().err
        assert expected in error and error.endswith("; do: see python -m launchers.preflight --help\n")

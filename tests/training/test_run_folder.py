"""Whose the run's folder is: a start that got nowhere does not keep the next one out, anything finished does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import WriteError
from pipeline.files import only_process_in
from pipeline.training import run_folder, run_record
from pipeline.training.run_folder import open_run_folder

ROOT = Path(__file__).parents[2]


def config(folder: Path, *overrides: str) -> Config:
    return load_config("fashion_mnist_s90", [f"output_dir={folder}", "data.train=t", "data.val=v", *overrides])


def leave(folder: Path, name: str, content: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """A folder in which a start failed just before its first step."""
    with open_run_folder(config(tmp_path), resume="none") as run:
        leave(tmp_path, "tickets/owner.json", json.dumps({"owner": run.run_id, "since": "2026-01-01"}))
        leave(tmp_path, "metrics.jsonl", '{"run": "r", "name": "n"}\n{"params": {"seed": "0"}}\n{"status": "FAI')
        leave(tmp_path, "crash-rank0.txt")
    return tmp_path


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_start_that_failed_before_step_0_does_not_block_the_corrected_one(failed: Path, resume: str) -> None:
    before = run_record.read_run_id(failed)
    with open_run_folder(config(failed, "sparsity.density=0.2"), resume=resume) as run:
        assert run.run_id == before, "what it has claimed, here or in an object store, is still its own"
        assert "density: 0.2" in (failed / "config.yaml").read_text()
        assert (failed / "tickets/owner.json").exists()
    with open_run_folder(config(failed, "name=other"), resume=resume) as run:
        assert run.run_id.startswith("other-")
        assert not (failed / "tickets/owner.json").exists(), "the claim of a run that is no more"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoints/step-00000005/manifest.json", "{}"),
        ("checkpoints/.step-00000005.0123.partial/state.json", "{}"),
        ("tickets/ticket-0000.safetensors", ""),
        ("report/report.json", "{}"),
        ("metrics.jsonl", '{"params": {}}\n{"step": 49, "metrics": {"train/loss": 1.0}}\n'),
    ],
)
def test_what_has_got_anywhere_is_not_started_again(failed: Path, name: str, content: str) -> None:
    leave(failed, name, content)
    kept = (failed / "config.yaml").read_bytes()
    with (
        pytest.raises(WriteError, match="already holds run fashion_mnist_s90-"),
        open_run_folder(config(failed), resume="none"),
    ):
        pass
    with open_run_folder(config(failed, "sparsity.density=0.2"), resume="auto"):
        assert (failed / "config.yaml").read_bytes() == kept


def test_without_locks_a_run_that_may_be_alive_is_left_alone(failed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "only_process_in", lambda _folder, **_: nullcontext(False))
    with (
        pytest.raises(WriteError, match="already holds run fashion_mnist_s90-"),
        open_run_folder(config(failed), resume="none"),
    ):
        pass


def test_in_kubernetes_the_lock_of_a_lost_node_is_waited_for(
    failed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "LEASE_SECONDS", 5.0)
    lost = ExitStack()
    lost.enter_context(only_process_in(failed))
    with pytest.raises(WriteError, match="is in use by process"), open_run_folder(config(failed), resume="none"):
        pass
    lease = threading.Timer(0.3, lost.close)
    lease.start()
    with open_run_folder(config(failed), resume="auto"):
        assert "waiting up to 5 s for its node to lose the lock" in caplog.text
    lease.join()


def test_of_two_jobs_that_take_a_failed_start_up_one_gets_it(failed: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.config.load import load_config
from pipeline.errors import WriteError
from pipeline.training.run_folder import open_run_folder
folder, density = sys.argv[1:]
given = [f"output_dir={folder}", "data.train=t", "data.val=v", f"sparsity.density={density}"]
config = load_config("fashion_mnist_s90", given)
print("ready", flush=True)
sys.stdin.readline()
try:
    with open_run_folder(config, resume="none"):
        print("has it", flush=True)
        sys.stdin.readline()
except WriteError as error:
    print(error.what, flush=True)
"""
    jobs = {
        density: subprocess.Popen(
            [sys.executable, "-c", code, str(failed), density],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for density in ("0.2", "0.3")
    }
    try:
        for job in jobs.values():
            assert job.stdout is not None and job.stdout.readline() == "ready\n"
        for job in jobs.values():
            assert job.stdin is not None
            job.stdin.write("\n")
            job.stdin.flush()
        answers = {density: job.stdout.readline() for density, job in jobs.items() if job.stdout is not None}
        (winner,) = [density for density, answer in answers.items() if answer == "has it\n"]
        (refusal,) = [answer for answer in answers.values() if answer != "has it\n"]
        assert f"is in use by process {jobs[winner].pid} on " in refusal
        assert f"density: {winner}" in (failed / "config.yaml").read_text()
    finally:
        for job in jobs.values():
            job.kill()
            job.communicate()

"""How a run ends, seen by a person: its line among a launcher's, and the command that resumes it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, command, kill, start

TRAIN = ROOT / "launchers" / "train.py"
PRINT = "import sys; from launchers.relaunch import resume_command; print(resume_command(sys.argv[1:]))"
ARGUMENTS = ["--config", "x", "--resume", "none", "model.args={width: 8}", "--allow-change", "seed"]
RESUMED = "--config x 'model.args={width: 8}' --allow-change seed --resume auto"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(PRINT)
    return path


def output_of(line: list[str], **environ: str) -> str:
    alone = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "CROSS_"))}
    done = subprocess.run(
        line, env=alone | {"PYTHONPATH": str(ROOT)} | environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_command_that_resumes_is_the_one_that_was_typed(script: Path) -> None:
    plain = [sys.executable, str(script)]
    assert output_of([*plain, *ARGUMENTS]) == f"{shlex.join(plain)} {RESUMED}"
    assert output_of([*plain, "--resume=auto", "--config", "x"]) == f"{shlex.join(plain)} --config x --resume auto"
    wrapped = ["env", *plain]  # replaces itself
    assert output_of([*wrapped, *ARGUMENTS]) == f"{shlex.join(plain)} {RESUMED}"


def test_the_command_that_resumes_is_that_of_the_launcher(script: Path) -> None:
    line = command("torchrun", script, ARGUMENTS, ranks=1)
    assert output_of(line) == f"{shlex.join(line[: -len(ARGUMENTS)])} {RESUMED}"
    supervised = [sys.executable, "-m", "launchers.run", "--nproc-per-node", "1", "--", str(script)]
    assert output_of([*supervised, *ARGUMENTS]) == f"{shlex.join(supervised)} {RESUMED}"


def test_a_launcher_on_another_host_is_named_without_its_options(script: Path) -> None:
    line = [sys.executable, str(script), "--local_rank=0", *ARGUMENTS]
    assert output_of(line, CROSS_SIZE="2") == f"deepspeed … {script} {RESUMED}"


def test_the_command_shows_no_secret(script: Path) -> None:
    shown = output_of([sys.executable, str(script), "--config", "x", "tracking.uri=http://me:hunter2@host"])
    assert "hunter2" not in shown and "[redacted]" in shown


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_line_stands_alone_among_those_of_a_launcher(launcher: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(launcher, TRAIN, ["--config", "fashion_mnist_s90", "sparsity.densty=1"]), log=log)
    try:
        assert process.wait(120) != 0
    finally:
        kill(process)
    lines = log.read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines) if line.startswith("ERROR[")]
    assert lines[found].startswith("ERROR[64] rank=0 override 'sparsity.densty=1': unknown key")
    assert (lines[found - 1], lines[found + 1]) == ("", "")
    assert len(lines) > found + 2, "the launcher writes lines of its own after it"

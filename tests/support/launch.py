"""Starts real multi-process runs for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(launcher: str, script: str | Path, arguments: Sequence[str], *, ranks: int = 2) -> list[str]:
    """Return the command line of ``script`` under one of the three launchers."""
    port = str(free_port())
    head = {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port],
    }[launcher]
    return [*head, str(script), *arguments]


def start(command_line: Sequence[str], *, cwd: Path = ROOT, log: Path) -> subprocess.Popen[bytes]:
    """Start the command in a new process group, with its output in ``log``."""
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    with log.open("ab") as file:
        return subprocess.Popen(
            command_line, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environ
        )


def run(command_line: Sequence[str], *, cwd: Path = ROOT, log: Path, timeout_seconds: float = 300) -> str:
    """Run to the end, require exit code 0, and return what was printed. Nothing is left running."""
    process = start(command_line, cwd=cwd, log=log)
    try:
        code = process.wait(timeout_seconds)
    finally:
        kill(process)
    text = log.read_text(errors="replace")
    assert code == 0, f"exit code {code}\n{text[-6000:]}"
    return text


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all its descendants: torchrun gives every rank its own session."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for victim in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def can_mount() -> bool:
    """Return whether this user may create mount namespaces."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    )

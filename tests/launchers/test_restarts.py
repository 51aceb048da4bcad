"""Restarts in place: two supervisors with their ranks, real gloo, one run that is broken again and again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.launchers.restarts_worker import after
from tests.support.launch import ROOT, free_port, kill, start

TIMEOUT_SECONDS = 120  # of each wait; the machine may be busy
WORKER = "tests/launchers/restarts_worker.py"
CODES = """
import os, sys
from pathlib import Path
with Path(sys.argv[1]).open("a") as file:
    file.write("started ")
Path(os.environ["TICKETWORKS_EXIT_DIR"], "rank-0").write_text(sys.argv[2])
sys.exit(int(sys.argv[2]))
"""


class Nodes:
    """Two nodes of one run."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder, self.command, self.port = folder, command, free_port()
        self.processes = [self.start(node) for node in (0, 1)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        options = [f"--master-port={self.port}", "--master-addr=127.0.0.1", "--nproc-per-node=1", "--peer-timeout=3"]
        supervisor = [sys.executable, "-m", "launchers.run", "--nnodes=2", f"--node-rank={node}", *options]
        return start([*supervisor, "--", *self.command], log=self.log(node))

    def log(self, node: int) -> Path:
        return self.folder / f"node-{node}.log"

    def step(self) -> int:
        with suppress(FileNotFoundError):
            return int((self.folder / "saved").read_text().split()[0])
        return 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.log(node).read_text()[-3000:] for node in (0, 1))
            time.sleep(0.02)

    def goes_on(self) -> None:
        """Wait for three steps after those that are saved."""
        before = self.step()
        self.wait_until(lambda: self.step() >= before + 3)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path, WORKER, str(tmp_path), "--resume=auto")
    yield made
    for process in made.processes:
        kill(process)


def of_node(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def test_a_run_survives_a_killed_rank_a_lost_node_and_one_that_hangs(nodes: Nodes) -> None:
    nodes.goes_on()
    first = nodes.processes[0].pid

    os.kill(int((nodes.folder / "pid-1").read_text()), signal.SIGKILL)
    nodes.goes_on()
    nodes.wait_until(lambda: "ranks failed with exit code 76, restart 1 of 3" in nodes.log(0).read_text())

    kill(nodes.processes[1])  # the whole pod, as its node sees it
    nodes.wait_until(lambda: "node 1 was lost; the ranks start again in place" in nodes.log(0).read_text())
    nodes.processes[1] = nodes.start(1)
    nodes.goes_on()

    for process in (stopped := of_node(nodes.processes[1])):
        process.suspend()
    lost = nodes.log(0).read_text().count("node 1 was lost")
    nodes.wait_until(lambda: nodes.log(0).read_text().count("node 1 was lost") > lost)
    before = nodes.step()
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    nodes.wait_until(lambda: nodes.step() > before)

    nodes.processes[1].send_signal(signal.SIGTERM)  # a drain: it saves and leaves, the other waits
    assert nodes.processes[1].wait(TIMEOUT_SECONDS) == 75
    nodes.wait_until(lambda: "node 1 has left with exit code 75" in nodes.log(0).read_text())
    nodes.processes[1] = nodes.start(1)
    nodes.goes_on()

    (nodes.folder / "finish").touch()
    assert [process.wait(TIMEOUT_SECONDS) for process in nodes.processes] == [0, 0]
    assert nodes.processes[0].pid == first and psutil.pid_exists(os.getpid())
    steps, total = map(int, (nodes.folder / "saved").read_text().split())
    expected = 0
    for step in range(steps):
        expected = after(step, expected, 2)
    assert total == expected  # no step was left out or made twice
    assert "restart 2 of" not in nodes.log(0).read_text()  # only the rank's own failure was counted


def test_a_code_that_a_retry_cannot_change_ends_all_nodes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODES)
    nodes = Nodes(tmp_path, str(script), str(tmp_path / "starts"), "64", "--resume=auto")
    try:
        assert [process.wait(TIMEOUT_SECONDS) for process in nodes.processes] == [64, 64]
    finally:
        for process in nodes.processes:
            kill(process)
    assert (tmp_path / "starts").read_text() in ("started ", "started started ")  # one may be stopped before


def test_another_number_of_nodes_ends_before_any_rank_starts(tmp_path: Path) -> None:
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nproc-per-node=1"]
    supervisor = [sys.executable, "-m", "launchers.run", *address]
    lines = [[*supervisor, f"--nnodes={2 + node}", f"--node-rank={node}", "--", WORKER] for node in (0, 1)]
    processes = [subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) for line in lines]
    try:
        errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [64, 64]
    for error in errors:
        assert re.fullmatch(
            r"ERROR\[64\] launchers.run: node 1 was started with nnodes 3, but node 0 with nnodes 2; do: .*\n", error
        )


@pytest.mark.parametrize(("code", "starts"), [("79", 2), ("73", 1)])
def test_a_bad_loss_is_tried_again_once_and_a_full_disk_never(tmp_path: Path, code: str, starts: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODES)
    command = [sys.executable, "-m", "launchers.run", "--nproc-per-node=1", "--", str(script), str(tmp_path / "starts")]
    done = subprocess.run([*command, code, "--resume", "auto"], cwd=ROOT, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == int(code)
    assert (tmp_path / "starts").read_text() == starts * "started "

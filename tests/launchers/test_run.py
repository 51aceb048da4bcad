"""The supervisor with real processes: its exit code, and what it does with signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.run import main, parse
from launchers.verdict import agreed_code

SUPERVISOR = [sys.executable, "-m", "launchers.run"]
CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 60

# Leaves a code as launchers/train.py does: python leave.py CODE-OF-RANK-0 CODE-OF-RANK-1
LEAVE = """
import os, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
code = int(sys.argv[1 + rank])
Path(os.environ["TICKETWORKS_EXIT_DIR"], f"rank-{rank}").write_text(str(code))
while len(list(Path(os.environ["TICKETWORKS_EXIT_DIR"]).iterdir())) < len(sys.argv) - 1:
    time.sleep(0.01)
sys.exit(code)
"""
NUMBERS = """
import os, sys
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(f"{os.environ['LOCAL_RANK']} of {os.environ['WORLD_SIZE']}")
"""
# One rank that saves and exits 75 when told to stop; before that it leaves an orphan behind and
# waits until somebody has reaped it.
PREEMPTED = """
import os, signal, subprocess, sys, time
from pathlib import Path
def stop(number, frame):
    Path(os.environ["TICKETWORKS_EXIT_DIR"], "rank-0").write_text("75")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
orphan = subprocess.run(["sh", "-c", "true & echo $!"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
while Path("/proc", orphan).exists():
    time.sleep(0.01)
Path(sys.argv[1]).touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_COMPLETION_INDEX", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)


def script(folder: Path, content: str) -> str:
    path = folder / "script.py"
    path.write_text(content)
    return str(path)


def supervise(*arguments: str) -> int:
    return subprocess.run([*SUPERVISOR, *arguments], cwd=CHECKOUT, timeout=TIMEOUT_SECONDS, check=False).returncode


@pytest.mark.parametrize(
    ("own", "codes", "expected"),
    [
        (0, [], 0),
        (1, [76, 78], 78),  # masks diverged on one rank, its peer only noticed that it ended
        (1, [75, 79], 79),
        (1, [76, 75], 75),
        (1, [1, 76], 1),  # an unexpected error, and the peer that lost it
        (1, [76, 65], 65),
        (1, [69, 64], 64),
        (1, [3], 3),  # a script that does not use the codes
        (2, [], 2),  # torchrun itself failed
        (-9, [], 76),  # torchrun was killed
    ],
)
def test_the_most_informative_code_wins(own: int, codes: list[int], expected: int) -> None:
    assert agreed_code(own, codes) == expected


def test_usage_errors_exit_64(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([], "expected a script after --"),
        (["--nnodes", "1"], "expected a script after --"),
        (["--nnodes", "2", "--", "x.py"], "more than one node needs --master-addr"),
        (["--node-rank", "1", "--", "x.py"], "--node-rank 1 is out of range for --nnodes 1"),
        (["--nproc-per-node", "0", "--", "x.py"], "'0' is not a whole number of at least 1"),
        (["--bogus", "--", "x.py"], "unrecognized arguments: --bogus"),
    ):
        monkeypatch.setattr(sys, "argv", ["launchers.run", *arguments])
        assert main() == 64
        error = capsys.readouterr().err
        assert error.startswith("ERROR[64] command line: ") and error.count("\n") == 1
        assert expected in error and error.endswith("; do: see python -m launchers.run --help\n")


def test_the_node_rank_comes_from_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["--nnodes", "4", "--master-addr", "train-0.train", "--", "x.py", "--", "a=1"]
    assert (parse(several).node_rank, parse(several).master_port, parse(several).command) == (
        0,
        29500,
        ["x.py", "--", "a=1"],
    )
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert parse(several).node_rank == 2
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert parse(several).node_rank == 3
    assert parse(["--node-rank", "1", *several]).node_rank == 1


def test_ranks_per_node_are_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, expected in (("0,1,2", 3), ("", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert parse(["--", "x.py"]).nproc_per_node == expected


def test_the_code_that_the_ranks_left_comes_out(tmp_path: Path) -> None:
    assert supervise("--nproc-per-node", "2", "--", script(tmp_path, LEAVE), "76", "78") == 78


def test_a_killed_rank_is_a_failed_peer(tmp_path: Path) -> None:
    assert supervise("--", script(tmp_path, "import os; os.kill(os.getpid(), 9)")) == 76


def test_a_code_nobody_left_comes_out_too(tmp_path: Path) -> None:
    assert supervise("--", script(tmp_path, "raise SystemExit(3)")) == 3


def test_two_nodes_find_each_other(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [
        *SUPERVISOR,
        "--nnodes",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port,
        "--nproc-per-node",
        "1",
    ]
    command += ["--", script(tmp_path, NUMBERS), str(tmp_path)]
    nodes = [
        subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, "JOB_COMPLETION_INDEX": index})
        for index in ("0", "1")
    ]
    assert [node.wait(TIMEOUT_SECONDS) for node in nodes] == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["0 of 2", "0 of 2"]


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a PID namespace of its own needs root and unshare"
)
def test_as_pid_1_it_reaps_and_forwards_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*namespace, *SUPERVISOR, "--shutdown-timeout", "20", "--", script(tmp_path, PREEMPTED), str(ready)]
    unshare = subprocess.Popen(command, cwd=CHECKOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not ready.exists():
            assert unshare.poll() is None and time.monotonic() < deadline, "the orphan was not reaped"
            time.sleep(0.05)
        supervisor = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
        os.kill(supervisor, signal.SIGTERM)
        assert unshare.wait(TIMEOUT_SECONDS) == 75
    finally:
        unshare.kill()
        unshare.wait()

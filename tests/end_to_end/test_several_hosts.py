"""The small job on three emulated hosts: network namespaces, real TCP, one rank each, shared storage."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.small_job import TRAIN, arguments, assert_same, tickets_of
from tests.support.launch import command, run
from tests.support.several_hosts import SSHD, launched, reachable_by_ssh, running
from tools.hosts import INTERFACE, hosts, unsupported_reason

pytestmark = pytest.mark.skipif(bool(unsupported_reason()), reason=unsupported_reason())

# The batch must be a multiple of three. The number of threads changes the last bits, and by default
# it is a share of the node's cores.
THREE = ["train.global_batch=48", "plan.reference_batch=48", "train.threads_per_rank=1"]
SHORT = ["plan.exploration.length=1 epochs", "plan.num_refinements=1", *THREE]  # two tickets
TIMEOUT_SECONDS = 6
NO_PDSH = [program for program in ("pdsh", "ssh", SSHD) if not shutil.which(program)]
WHY_NO_PDSH = f"{', '.join(NO_PDSH)} not found: apt-get install pdsh openssh-client openssh-server"


@pytest.fixture(scope="module")
def on_one_host(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one-host"
    run(command("torchrun", TRAIN, arguments(data, output, *SHORT), ranks=3), log=output.with_suffix(".log"))
    return output


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        pytest.param("pdsh", marks=pytest.mark.skipif(bool(NO_PDSH), reason=WHY_NO_PDSH)),
    ],
)
def test_three_hosts_make_the_tickets_of_one(launcher: str, on_one_host: Path, data: Path, tmp_path: Path) -> None:
    options = arguments(data, tmp_path / "run", *SHORT)
    with (
        hosts(3) as at,
        reachable_by_ssh(at, tmp_path) if launcher == "pdsh" else nullcontext(),
        running(launched(launcher, at, tmp_path, options), tmp_path) as processes,
    ):
        codes = [process.wait(240) for process in processes]
    logs = [(tmp_path / f"host-{index}.log").read_text() for index in range(len(codes))]
    assert codes == [0] * len(codes), logs[0][-3000:]
    assert_same(tickets_of(on_one_host), tickets_of(tmp_path / "run"), num=2)
    # one rank reports; pdsh says which host's
    reports = [re.findall(r"^(?:h\d: )?(?=superposition-mean +\d)", log, re.MULTILINE) for log in logs]
    assert reports == ([["h0: "]] if launcher == "pdsh" else [[""], [], []])
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(("fault", "num_hosts"), [("stopped", 3), ("cut off", 2)])
def test_a_peer_that_stops_answering_is_named_in_time(fault: str, num_hosts: int, data: Path, tmp_path: Path) -> None:
    options = arguments(data, tmp_path / "run", *THREE, f"train.collective_timeout_seconds={TIMEOUT_SECONDS}")
    with hosts(num_hosts) as at, running(launched("torchrun", at, tmp_path, options), tmp_path) as processes:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "step-00000005").exists():
            assert time.monotonic() < deadline, (tmp_path / "host-0.log").read_text()[-3000:]
            time.sleep(0.01)
        if fault == "stopped":
            for process in [
                psutil.Process(processes[-1].pid),
                *psutil.Process(processes[-1].pid).children(recursive=True),
            ]:
                process.send_signal(signal.SIGSTOP)
        else:
            subprocess.run(["ip", "-n", at[-1].namespace, "link", "set", INTERFACE, "down"], check=True)
        began = time.monotonic()
        ranks = [
            p
            for process in processes[:-1]
            for p in psutil.Process(process.pid).children(recursive=True)
            if str(TRAIN) in p.cmdline()
        ]
        psutil.wait_procs(ranks, timeout=TIMEOUT_SECONDS + 30)
        seconds = time.monotonic() - began
        time.sleep(0.5)
        told = re.findall(
            r"^ERROR\[76\].*",
            "\n".join((tmp_path / f"host-{i}.log").read_text() for i in range(num_hosts - 1)),
            re.MULTILINE,
        )
    assert len(ranks) == num_hosts - 1
    assert seconds < TIMEOUT_SECONDS + 5
    assert len(told) == 1, told
    assert re.match(
        r"ERROR\[76\] rank=0 step=\d+ the collective in \w+ \(\w+\.py\): "
        rf"no response from rank {num_hosts - 1} within 3 s: ",
        told[0],
    )

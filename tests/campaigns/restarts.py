"""Break one run of three nodes again and again, and time how long each takes to train on, by parts.

::

    python -m tests.campaigns.restarts
    python -m tests.campaigns.restarts --incidents pod pod rank hang

The nodes are network namespaces with real TCP and a process namespace each, so that a node's supervisor is PID 1 as
in a pod. A lost pod is started again at once, as a controller would do after its own delay. The run must end on all
nodes with 0, with the weights, masks and tickets of one that was left alone, bit for bit. Needs root.
For a node that hangs or is cut off, the first part of the time includes the 45 s until it is replaced or back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from pipeline.command_line import local_path
from tests.campaigns.small_runs import arguments, differs, outcome_of
from tests.end_to_end.small_job import make_data
from tests.support.launch import kill, start
from tests.support.several_hosts import TRAIN
from tools.hosts import INTERFACE, Host, hosts, unsupported_reason

NODES, STEPS, NEW_STEPS = 3, 480, 15
RUN = [
    *("train.global_batch=66", "plan.reference_batch=66", "train.threads_per_rank=1"),
    *("plan.timetable=itop", "plan.num_refinements=0", "plan.refinement=null"),
    *(f"plan.exploration.length={STEPS} steps", "plan.exploration.update_interval=20 steps"),
    *("tracking.log_every_steps=1", "train.collective_timeout_seconds=300"),
]
INCIDENTS = ("rank", "pod", "hang", "pod0", "drain", "partition")
DEFAULT = [*["rank", "pod"] * 5, "hang", "hang", "pod0", "drain", "partition"]
PEER_TIMEOUT, BACK_AFTER = 30, 45.0  # seconds; of a node that hangs or is cut off, until it is replaced or back
PARTS = (  # the last lines of node 0 after a loss, in their order
    ("noticed and stopped", r"the ranks start again in place|waiting for|all 3 nodes are here"),
    ("nodes met", r"all 3 nodes are here"),
    ("torchrun, configuration, data", r"loading torch"),
    ("imports, process group", r"device: "),
    ("checkpoint loaded", r"resumed from"),
)


class Pods:
    """The three supervisors, each on its own host."""

    def __init__(self, at: Sequence[Host], folder: Path, options: Sequence[str]) -> None:
        self.at, self.folder, self.options = at, folder, options
        self.processes = [self._start(node) for node in range(len(at))]

    def _start(self, node: int) -> subprocess.Popen[bytes]:
        supervisor = [sys.executable, "-m", "launchers.run", f"--nnodes={NODES}", "--nproc-per-node=1"]
        supervisor += [f"--node-rank={node}", f"--master-addr={self.at[0].name}", "--master-port=29500"]
        supervisor += [f"--peer-timeout={PEER_TIMEOUT}", "--restarts=20", "--", str(TRAIN), *self.options]
        pod = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *supervisor]
        return start(self.at[node].command(["env", f"GLOO_SOCKET_IFNAME={INTERFACE}", *pod]), log=self.log(node))

    def log(self, node: int) -> Path:
        return self.folder / f"node-{node}.log"

    def supervisor(self, node: int) -> psutil.Process:
        return psutil.Process(self.processes[node].pid).children()[0]

    def all_of(self, node: int) -> list[psutil.Process]:
        return [self.supervisor(node), *self.supervisor(node).children(recursive=True)]

    def rank_of(self, node: int) -> psutil.Process:
        return next(p for p in self.all_of(node) if str(TRAIN) in p.cmdline()[:3])

    def replace(self, node: int) -> None:
        kill(self.processes[node])
        self.processes[node] = self._start(node)

    def close(self) -> None:
        for process in self.processes:
            kill(process)


@contextlib.contextmanager
def started(at: Sequence[Host], folder: Path, options: Sequence[str]) -> Iterator[Pods]:
    folder.mkdir()
    pods = Pods(at, folder, options)
    try:
        yield pods
    finally:
        pods.close()


def last_step(output: Path) -> int:
    """Return the step of the last line of metrics.jsonl; -1 if there is none."""
    with contextlib.suppress(OSError):
        found = re.findall(rb'"step": ?(\d+)', (output / "metrics.jsonl").read_bytes()[-4000:])
        return int(found[-1]) if found else -1
    return -1


def wait_for_step(pods: Pods, output: Path, step: int, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while last_step(output) < step:
        assert time.monotonic() < deadline, f"step {step} did not come\n{pods.log(0).read_text()[-3000:]}"
        time.sleep(0.05)


def happen(kind: str, pods: Pods) -> Iterator[float]:
    """Let an incident happen: yields when a node is lost, and ends when its pod or host is back."""
    yield time.monotonic()
    if kind == "rank":
        pods.rank_of(1).kill()
    elif kind in ("pod", "pod0"):
        pods.replace(0 if kind == "pod0" else 2)
    elif kind == "drain":
        pods.supervisor(1).send_signal(signal.SIGTERM)
        code = pods.processes[1].wait(60)
        assert code == 75, f"exit code {code} of a drained pod"
        pods.replace(1)
    elif kind == "hang":
        for process in pods.all_of(2):
            process.suspend()
        time.sleep(BACK_AFTER)
        pods.replace(2)
    elif kind == "partition":
        link = ["ip", "-n", pods.at[1].namespace, "link", "set", INTERFACE]
        subprocess.run([*link, "down"], check=True)
        time.sleep(BACK_AFTER)
        subprocess.run([*link, "up"], check=True)


def timed(kind: str, pods: Pods, output: Path) -> tuple[float, list[float]]:
    """Return the seconds from a loss to the next step that is new, and those of its parts."""
    position = pods.log(0).stat().st_size
    before = last_step(output)
    incident = happen(kind, pods)
    lost = next(incident)
    next(incident, None)
    times: list[float] = []
    while True:
        with pods.log(0).open("rb") as file:
            file.seek(position)
            text = file.read().decode(errors="replace")
        while len(times) < len(PARTS) and re.search(PARTS[len(times)][1], text):
            times.append(time.monotonic())
        if len(times) < 2:  # ranks that have not noticed the loss may end a step
            before = max(before, last_step(output))
        before_all = time.monotonic() - lost
        if len(times) == len(PARTS) and last_step(output) > before:
            times.append(time.monotonic())
            break
        assert before_all < 300, f"no new step after {kind}\n{text[-3000:]}"
        time.sleep(0.02)
    return times[-1] - lost, [b - a for a, b in zip([lost, *times], times, strict=False)]


def run(data: Path, folder: Path, incidents: Sequence[str]) -> bool:
    """Run once undisturbed and once with the incidents; print a line for each; return whether all is well."""
    names = [name for name, _ in PARTS] + ["decoders, first steps"]
    bad = 0
    with hosts(NODES) as at:
        straight, broken = folder / "straight", folder / "broken"
        with started(at, folder / "straight.logs", arguments(data, straight, *RUN, resume="auto")) as pods:
            codes = [process.wait(900) for process in pods.processes]
            assert codes == [0] * NODES, f"{codes}\n{pods.log(0).read_text()[-3000:]}"
        with started(at, folder / "broken.logs", arguments(data, broken, *RUN, resume="auto")) as pods:
            wait_for_step(pods, broken, NEW_STEPS)
            for number, kind in enumerate(incidents):
                seconds, parts = timed(kind, pods, broken)
                time_of_kind = incidents[: number + 1].count(kind)
                shares = ", ".join(f"{name} {part:.1f}" for name, part in zip(names, parts, strict=True))
                load = os.getloadavg()[0]
                print(f"{kind} {time_of_kind}: {seconds:.1f} s ({shares}), load {load:.1f}", flush=True)
                if last_step(broken) + NEW_STEPS < STEPS:
                    wait_for_step(pods, broken, last_step(broken) + NEW_STEPS)
            codes = [process.wait(900) for process in pods.processes]
            bad += codes != [0] * NODES
        bad += differs("the run with incidents", outcome_of(straight, STEPS), outcome_of(broken, STEPS))
    print(f"exit codes {codes}; {'the same bits as without incidents' if not bad else 'NOT WELL'}")
    return not bad


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--incidents", nargs="+", choices=INCIDENTS, default=DEFAULT, metavar="KIND")
    parser.add_argument("--folder", type=local_path, metavar="FOLDER", help="keep logs and runs here")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no pod and no host is left behind
    if reason := unsupported_reason():
        raise SystemExit(f"cannot emulate hosts: {reason}")
    with tempfile.TemporaryDirectory(prefix="restarts-") as temporary:
        folder = given.folder or Path(temporary)
        (folder / "idx").mkdir(parents=True)
        (folder / "data").mkdir()
        make_data(folder / "idx", folder / "data")
        is_well = run(folder / "data", folder, given.incidents)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())

"""An MLflow server that is killed and comes back while a run reports to it: ``python -m tests.campaigns.tracking``.

Steps of fixed work, each of which reports two metrics, beside a real server on another core: one run without an outage, one in which the
server is killed (SIGKILL) and started again, one more without; and one start against a server that accepts and never answers. Prints what
arrived, the 99th percentile of the step time of each run, and how long the start took. Exits with 1 when a metric is lost or is there
twice, when that start takes 10 s, or when the outage changes the 99th percentile by more than 5% and what the two quiet runs differ by.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.schema import TrackingConfig
from pipeline.tracking import open_tracker
from pipeline.tracking.spooled import replay
from tests.support.launch import free_port

START_SECONDS = 120
RUNS = ("quiet", "outage", "quiet-again")  # in this order
ALLOWED_CHANGE = 0.05  # of the 99th percentile


@dataclass
class Server:
    """A real ``mlflow server`` with its store in ``folder``."""

    folder: Path
    port: int = field(default_factory=free_port)
    cores: frozenset[int] | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", str(self.folder / "artifacts")]
        environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=self.folder, start_new_session=True)
        if self.cores:
            os.sched_setaffinity(self.process.pid, self.cores)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def work(num: int) -> None:
    """A fixed amount, as a step of training is."""
    matrix = torch.full((200, 200), 0.01)
    for _ in range(num):
        matrix = (matrix @ matrix).clamp_(-1, 1)


def amount_for(milliseconds: float) -> int:
    """What ``work`` needs so long for, nearly."""
    started = time.perf_counter()
    work(2000)
    return max(1, round(2000 * milliseconds / 1000 / (time.perf_counter() - started)))


def report_steps(server: Server, folder: Path, *, steps: int, amount: int, at: dict[int, Callable[[], None]]) -> list[float]:
    """Milliseconds of each step of a run that reports to ``server``; before the steps named in ``at`` something happens."""
    times = []
    config = TrackingConfig(backend="mlflow", experiment="outage", uri=server.uri)
    with open_tracker(config, output_dir=folder, run_name=folder.name) as tracker:
        for step in range(steps):
            if step in at:
                at[step]()
            started = time.perf_counter()
            work(amount)
            tracker.log_metrics({"train/loss": 1 / (step + 1), "time/step_seconds": 0.01}, step=step)
            times.append((time.perf_counter() - started) * 1000)
    return times


def arrived(server: Server, name: str) -> list[int]:
    """The steps of ``train/loss`` that the server has of a run, in order, as often as it has them."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("outage")
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"attributes.run_name = '{name}'")
    found, token = [], None
    while True:
        page = client._tracking_client.store.get_metric_history(run.info.run_id, "train/loss", max_results=10000, page_token=token)
        found += [point.step for point in page]
        token = getattr(page, "token", None)
        if not token:
            return sorted(found)


def p99(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def change_of_p99(before: Sequence[float], outage: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Of the outage against the mean of the two quiet runs around it, and of these against each other; both are shares of that mean."""
    quiet = (p99(before) + p99(after)) / 2
    return abs(p99(outage) / quiet - 1), abs(p99(before) - p99(after)) / quiet


def seconds_to_start_with_a_silent_server(folder: Path) -> float:
    """The server accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = TrackingConfig(backend="mlflow", uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        tracker = open_tracker(config, output_dir=folder, run_name="silent")
        seconds = time.monotonic() - started
        tracker.close()
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="of each run (default 6000)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="work of one step (default 10)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tracking-") as temporary:
        folder = Path(temporary)
        server = Server(folder, cores=frozenset(cores[1:]))
        try:
            server.start()
            if len(cores) > 1:
                os.sched_setaffinity(0, {cores[0]})
            server.wait()
            outage = {given.steps // 4: server.kill, given.steps // 2: server.start}
            amount = amount_for(given.step_ms)
            times = {}
            for name in RUNS:
                at = outage if name == "outage" else {}
                times[name] = report_steps(server, folder / name, steps=given.steps, amount=amount, at=at)
                server.wait()
            late = replay(folder / "outage")
            is_complete = all(arrived(server, run) == list(range(given.steps)) for run in RUNS)
        finally:
            server.kill()
        silent = seconds_to_start_with_a_silent_server(folder / "silent")
    print(f"metrics: {'every one arrived once' if is_complete else 'LOST OR DOUBLED'}; {late} records by a replay after the end")
    for name, ms in times.items():
        print(f"{name}: 99th percentile of {given.steps} steps {p99(ms):.3f} ms, median {statistics.median(ms):.3f} ms")
    change, noise = change_of_p99(*times.values())
    is_unchanged = change <= ALLOWED_CHANGE + noise
    print(f"the outage changes the 99th percentile by {change:.1%}, the quiet runs differ by {noise:.1%}", end=": ")
    print(f"{'within' if is_unchanged else 'MORE THAN'} {ALLOWED_CHANGE:.0%} and that difference")
    print(f"a server that never answers delays the start by {silent:.1f} s")
    return 0 if is_complete and is_unchanged and silent < 10 else 1


if __name__ == "__main__":
    sys.exit(main())

"""Kill and restart an MLflow server while a run reports to it: ``python -m tests.campaigns.tracking``.

One run takes steps of fixed work and reports two metrics every few steps to a real server on another
core. Each round has three stretches: in the first the server answers, before the second it is killed
(SIGKILL), and before the third it is started again; whatever else the machine does affects all of
them alike. Another run starts against a server that accepts connections and never answers.

Prints what arrived, the 99th percentile of the step time with the server and during the outages,
their ratio with its 90% interval (rounds are drawn with replacement), and how long the start took.
Exits with 1 if a metric is lost or arrives twice, if that start takes 10 s, or if the outages change
the 99th percentile by more than 5%.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config.schema import TrackingConfig
from pipeline.tracking import open_tracker
from pipeline.tracking.spooled import replay
from tests.support.launch import free_port

START_SECONDS = 120
WARM_UP = 200  # steps before the first round
ALLOWED_CHANGE = 0.05  # of the 99th percentile
DRAWS = 2000  # for the interval


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
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, cwd=self.folder, start_new_session=True
            )
        if self.cores:
            os.sched_setaffinity(self.process.pid, self.cores)

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Send SIGKILL to the server and its workers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def work(num: int) -> None:
    """Do a fixed amount of work, like a step of training."""
    matrix = torch.full((200, 200), 0.01)
    for _ in range(num):
        matrix = (matrix @ matrix).clamp_(-1, 1)


def amount_for(milliseconds: float) -> int:
    """Return the amount for which ``work`` needs about this time."""
    started = time.perf_counter()
    work(2000)
    return max(1, round(2000 * milliseconds / 1000 / (time.perf_counter() - started)))


def report_steps(
    server: Server, folder: Path, *, rounds: int, steps: int, every: int, amount: int
) -> NDArray[np.float64]:
    """Time each step of a run that reports to ``server``, which answers again at the end.

    Returns:
        Milliseconds: [rounds, 3 stretches, steps].
    """
    times = np.empty((rounds, 3, steps))
    config = TrackingConfig(backend="mlflow", experiment="outage", uri=server.uri)
    with open_tracker(config, output_dir=folder, run_name=folder.name) as tracker:

        def step_ms(index: int) -> float:
            started = time.perf_counter()
            work(amount)
            if index % every == 0:
                tracker.log_metrics({"train/loss": 1 / (index + 1), "time/step_seconds": 0.01}, step=index)
            return (time.perf_counter() - started) * 1000

        for index in range(WARM_UP):
            step_ms(index)
        for place in np.ndindex(times.shape):
            match place[1:]:
                case (1, 0):
                    server.kill()
                case (2, 0):
                    server.start()
            times[place] = step_ms(WARM_UP + int(np.ravel_multi_index(place, times.shape)))
        server.wait()
    return times


def arrived(server: Server, name: str) -> list[int]:
    """Return the steps of ``train/loss`` that the server has of a run, in order, with repetitions."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("outage")
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"attributes.run_name = '{name}'")
    found, token = [], None
    while True:
        page = client._tracking_client.store.get_metric_history(
            run.info.run_id, "train/loss", max_results=10000, page_token=token
        )
        found += [point.step for point in page]
        token = getattr(page, "token", None)
        if not token:
            return sorted(found)


def p99(times: NDArray[np.float64]) -> float:
    return float(np.quantile(times, 0.99))


def change_of_p99(times: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the relative change of the 99th percentile by outages (down, coming back).

    Over all rounds, and its 90% interval.
    """

    def change(rounds: NDArray[np.float64]) -> float:
        return p99(rounds[:, 1:]) / p99(rounds[:, 0]) - 1

    drawn = np.random.default_rng(0).integers(len(times), size=(DRAWS, len(times)))
    low, high = np.quantile([change(times[rows]) for rows in drawn], [0.05, 0.95])
    return change(times), float(low), float(high)


def seconds_to_start_with_a_silent_server(folder: Path) -> float:
    """Time the start of a run with a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = TrackingConfig(backend="mlflow", uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        tracker = open_tracker(config, output_dir=folder, run_name="silent")
        seconds = time.monotonic() - started
        tracker.close()
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="number of rounds, of three stretches each (default: 20)"
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps per stretch (default: 1000)")
    parser.add_argument(
        "--report-every",
        type=int,
        default=10,
        metavar="N",
        help="steps between reports; training uses 50 (default: 10)",
    )
    parser.add_argument(
        "--step-ms", type=float, default=10.0, metavar="MS", help="work per step, in milliseconds (default: 10)"
    )
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
            amount = amount_for(given.step_ms)
            every = given.report_every
            times = report_steps(
                server, folder / "outage", rounds=given.rounds, steps=given.steps, every=every, amount=amount
            )
            late = replay(folder / "outage")
            is_complete = arrived(server, "outage") == list(range(0, WARM_UP + times.size, every))
        finally:
            server.kill()
        silent = seconds_to_start_with_a_silent_server(folder / "silent")
    outcome = "every one arrived once" if is_complete else "LOST OR DOUBLED"
    print(f"metrics: {outcome}; {late} records arrived by a replay after the end")
    for name, ms in {
        "with a server": times[:, 0],
        "during outages": times[:, 1:],
        "down": times[:, 1],
        "coming back": times[:, 2],
    }.items():
        print(f"{name}: 99th percentile of {ms.size:,} steps {p99(ms):.3f} ms, median {np.median(ms):.3f} ms")
    change, low, high = change_of_p99(times)
    is_unchanged = abs(change) <= ALLOWED_CHANGE
    print(
        f"{given.rounds} outages change the 99th percentile by {change:+.1%} (90% interval {low:+.1%} to {high:+.1%})",
        end=": ",
    )
    print(f"{'within' if is_unchanged else 'MORE THAN'} {ALLOWED_CHANGE:.0%}")
    print(f"a server that never answers delays the start by {silent:.1f} s")
    return 0 if is_complete and is_unchanged and silent < 10 else 1


if __name__ == "__main__":
    sys.exit(main())

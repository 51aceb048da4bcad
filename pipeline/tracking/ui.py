"""Open runs in MLflow's pages: start its server on this machine where there is none, and name the right page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pipeline.errors import ConfigError, ServiceError
from pipeline.redaction import REDACTED, printable
from pipeline.tracking.address import SERVERS
from pipeline.tracking.journal import require_journal
from pipeline.tracking.place import WORKFLOW, RecordedRun, find_run, free_ui_port

START_SECONDS = 120.0  # importing MLflow can take a minute on a busy machine
STOP_SECONDS = 10.0
# as in a run, see mlflow_tracker; and without the jobs of MLflow's evaluation of language models
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def show(output_dirs: Sequence[Path], *, compares: bool, opens_browser: bool) -> int:
    """Print the address of the page that shows runs, open it in a browser, and serve it until Ctrl-C.

    Runs that are in different stores, or in none, are first copied into one that is deleted at the end.

    Args:
        output_dirs: the runs' folders.
        compares: one page that compares the runs; otherwise the page of each run.
        opens_browser: whether to open the page in the user's browser.

    Returns:
        0.

    Raises:
        ConfigError: a folder is not a run's, or the password of its server is not known.
        ServiceError: MLflow's server does not start.
    """
    for each in output_dirs:
        require_journal(each)
    with contextlib.ExitStack() as held, contextlib.suppress(KeyboardInterrupt):
        held.enter_context(_ends_on_sigterm())
        runs, uri = _in_one_store(output_dirs, held, needs_one_experiment=compares)
        if uri.startswith(SERVERS):
            server, is_ours = uri.rstrip("/"), False
        else:
            print("starting MLflow …", flush=True)
            server, is_ours = held.enter_context(_serving(uri)), True
        addresses = [charts_page(server, runs), table_page(server, runs)] if compares else []
        addresses = addresses or [run_page(server, run) for run in runs]
        names = ["charts", "table"] if compares else [str(each) for each in output_dirs]
        for name, address in zip(names, addresses, strict=True):
            print(f"{name:8}  {address}", flush=True)
        if opens_browser:
            webbrowser.open(addresses[0])
        if is_ours:
            print("Ctrl-C ends it", flush=True)
            while True:
                signal.pause()
    return 0


def run_page(server: str, run: RecordedRun) -> str:
    """Return the address of a run's page."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}?{WORKFLOW}"


def charts_page(server: str, runs: Sequence[RecordedRun]) -> str:
    """Return the address of the charts of some runs of one experiment: a bar per run, and their curves together."""
    ids = ", ".join(f"'{run.run_id}'" for run in runs)
    query = f"compareRunsMode=CHART&searchFilter={quote(f'attributes.run_id IN ({ids})')}"
    return f"{server}/#/experiments/{runs[0].experiment_id}/runs?{WORKFLOW}&{query}"


def table_page(server: str, runs: Sequence[RecordedRun]) -> str:
    """Return the address of the table of all metrics and of the parameters that differ."""
    ids, experiments = [run.run_id for run in runs], sorted({run.experiment_id for run in runs})
    return f"{server}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"


def _in_one_store(
    output_dirs: Sequence[Path], held: contextlib.ExitStack, *, needs_one_experiment: bool
) -> tuple[list[RecordedRun], str]:
    """Return the runs and their common store: the one that they are in, or a copy that ``held`` deletes."""
    found = [find_run(each) for each in output_dirs]
    runs = [run for run in found if run is not None]
    experiments = {run.experiment_id for run in runs}
    is_common = len(runs) == len(found) and len({run.uri for run in runs}) == 1
    if is_common and (len(experiments) == 1 or not needs_one_experiment):
        if REDACTED in runs[0].uri:
            raise ConfigError(
                f"cannot connect to {runs[0].uri}: its password is not stored on disk",
                do="open it in a browser and log in"
                if runs[0].uri.startswith(SERVERS)
                else "run `mlflow ui --backend-store-uri URI` yourself, with the password in URI",
            )
        return runs, runs[0].uri
    from pipeline.tracking.local_view import copy_runs  # imports mlflow, which takes seconds

    print(f"copying {len(output_dirs)} runs into one view …", flush=True)
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-view-", ignore_cleanup_errors=True)))
    copied = copy_runs(output_dirs, folder)
    return copied, copied[0].uri


@contextlib.contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that the server is ended too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _serving(uri: str) -> Iterator[str]:
    """Start MLflow's server for a store, on this machine only; yield its address once it answers; end it afterwards."""
    port = free_ui_port()
    with tempfile.TemporaryDirectory(prefix="mlflow-ui-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", uri, "--artifacts-destination", folder]
        with log.open("w") as output:
            # a session of its own: Ctrl-C in the terminal then reaches this process only, which ends the server
            server = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(server)


def _wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), direct.open(f"{address}/health", timeout=5):
            return
        time.sleep(0.2)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    why = f"no answer within {START_SECONDS:g} s" if server.poll() is None else f"it ended with {server.returncode}"
    raise ServiceError(
        f"MLflow's server did not start at {address}: {why}: {printable(said[-1], max_characters=300)}",
        do="run `mlflow ui` with the same store to see all of its output",
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
            return

"""Where the records of a run go in MLflow: decided before torch and mlflow are imported, without connecting.

The first of these that says something decides:

1. ``tracking.uri`` of the configuration;
2. the variable ``MLFLOW_TRACKING_URI``, which is MLflow's own;
3. ``mlflow.db`` in the run's folder, if it exists: earlier versions wrote it;
4. ``mlflow.db`` in the parent folder, which all runs side by side share, or in the run's own folder
   where several writers would not be safe.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import sqlite3
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipeline.command_line import expand_home
from pipeline.config.checks import bad_address
from pipeline.config.schema import TrackingConfig
from pipeline.errors import ConfigError
from pipeline.redaction import redact
from pipeline.tracking.address import DATABASES, SERVERS, check_address, sqlite_path, sqlite_uri, with_absolute_path
from pipeline.tracking.journal import Acknowledged
from pipeline.tracking.mounts import network_file_system
from pipeline.tracking.tracker import PARENT_RUN, PENDING

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
DEFAULT_EXPERIMENT = "ticketworks"
UI_PORTS = range(5000, 5020)
# without it MLflow's pages show their menu for language models
WORKFLOW = "workflowType=machine_learning"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_RECORD = "run.json"  # a folder with it is a run's, see pipeline.training.run_record
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Place:
    """Where the records of a run go."""

    uri: str  # of the store, for MLflow's client; it may contain a password
    experiment: str
    setting: str  # the key or variable that decided
    reason: str  # the same as a sentence
    run_id: str = ""  # MLFLOW_RUN_ID: the run to continue, which somebody else created

    @property
    def shown(self) -> str:
        """One line that says where records go and why, without a password."""
        run = f", run {self.run_id} (MLFLOW_RUN_ID)" if self.run_id else ""
        return f"MLflow: {redact(self.uri)}, experiment {self.experiment}{run}: {self.reason}"


@dataclass(frozen=True)
class RecordedRun:
    """The MLflow run that a folder's records were sent to."""

    uri: str  # of the store; a password is redacted
    run_id: str
    experiment_id: str


def where(output_dir: Path, config: TrackingConfig) -> Place:
    """Decide where the records of the run in ``output_dir`` go. Nothing is created, and no server is contacted.

    Args:
        output_dir: the run's folder, which need not exist.
        config: the section ``tracking`` of the configuration.
    """
    experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
    # of a sweep it is the parent run, and not each of its members
    run_id = "" if os.environ.get(PARENT_RUN) else os.environ.get("MLFLOW_RUN_ID", "")
    if config.uri:
        return Place(with_absolute_path(config.uri), experiment, "tracking.uri", "tracking.uri is set", run_id)
    if uri := os.environ.get(URI_VARIABLE):
        reason = f"{URI_VARIABLE} is set, and tracking.uri is not"
        return Place(with_absolute_path(uri), experiment, URI_VARIABLE, reason, run_id)
    database, reason = default_database(output_dir)
    return Place(sqlite_uri(database), experiment, "output_dir", reason, run_id)


def check_place(place: Place) -> None:
    """Check scheme, driver and path of the store, and the variables of MLflow, without connecting.

    Raises:
        ConfigError: the place cannot be used; the message names the key or variable.
    """
    if place.setting != "output_dir" and (problem := next(bad_address(place.uri, setting=place.setting), "")):
        raise ConfigError(problem)
    if place.setting == URI_VARIABLE:
        try:
            expand_home(os.environ.get(URI_VARIABLE, ""))  # place.uri is made absolute already
        except ValueError as error:
            raise ConfigError(f"{URI_VARIABLE}: {error}") from None
    if place.run_id and not _RUN_ID.fullmatch(place.run_id):
        raise ConfigError(
            f"MLFLOW_RUN_ID={place.run_id}: is not a valid MLflow run ID; expected 1 to 128 characters, each a letter "
            "A–Z or a–z, a digit, - or _",
            do="correct it, or unset it",
        )
    check_address(place.uri, setting=place.setting)


def check_tracking(config: TrackingConfig, output_dir: Path) -> None:
    """Check before anything slow what rank 0 will open: :func:`check_place`; the other ranks open nothing."""
    if config.backend == "mlflow" and os.environ.get("RANK", "0") == "0":
        check_place(where(output_dir, config))


def find_run(output_dir: Path) -> RecordedRun | None:
    """Return the MLflow run that the records of the run in ``output_dir`` were sent to; None if there is none.

    A SQLite store that has moved together with the run's folder is found at its new place. Whether a
    server still has the run is not asked.
    """
    output_dir = output_dir.resolve()
    sent = Acknowledged.load(output_dir)
    if sent is None or not sent.run_id or sent.run_id.startswith(PENDING):
        return None
    uri = stored_uri(output_dir, sent.uri)
    database = sqlite_path(uri)
    if database is not None and not _has_run(database, sent.run_id):
        return None
    return RecordedRun(uri, sent.run_id, sent.experiment_id)


def _has_run(database: Path, run_id: str) -> bool:
    """Return whether a SQLite store can be read and has the run."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False


def stored_uri(output_dir: Path, saved: str) -> str:
    """Return the store that ``metrics.sent.json`` names as ``saved``: empty stands for the database in the folder.

    Where the database that it names no longer exists, the folder has moved, and the default decides.
    """
    if not saved:
        return sqlite_uri(output_dir / DATABASE)
    database = sqlite_path(saved)
    if database is not None and not database.exists():
        return sqlite_uri(default_database(output_dir)[0])
    return saved


def saved_uri(output_dir: Path, uri: str) -> str:
    """Return what ``metrics.sent.json`` calls the store at ``uri``, see :func:`stored_uri`; without its password."""
    return "" if uri == sqlite_uri(output_dir / DATABASE) else redact(uri)


def default_database(output_dir: Path) -> tuple[Path, str]:
    """Return the SQLite file for the run in ``output_dir`` where nothing is configured, and the reason."""
    output_dir = output_dir.resolve()
    own, parent = output_dir / DATABASE, output_dir.parent
    if own.exists():
        return own, "it is this run's own database"
    if (parent / RUN_RECORD).exists():  # a report inside a run's folder belongs to that run
        return default_database(parent)
    if problem := _not_shareable(output_dir):
        return own, f"this run has a database of its own, because {problem}"
    return parent / DATABASE, "the runs side by side share it"


def _not_shareable(output_dir: Path) -> str:
    """Return why the runs beside ``output_dir`` cannot share a database in its parent folder; empty if they can."""
    parent = output_dir.parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if kind := network_file_system(parent):
        return f"{parent} is on network storage ({kind}), where SQLite is not safe with several writers"
    if output_dir.exists() and output_dir.stat().st_dev != existing.stat().st_dev:
        return f"{output_dir} is on another file system than {parent}"
    if existing.stat().st_mode & stat.S_ISVTX:
        return f"{existing} is a folder of all users"
    database = parent / DATABASE
    if not os.access(existing, os.W_OK | os.X_OK) or (database.exists() and not os.access(database, os.W_OK)):
        return f"this user may not write to {database if database.exists() else existing}"
    return ""


def artifact_folder(uri: str) -> Path | None:
    """Return the folder for artifacts beside a SQLite file; None for a server, which chooses its own."""
    database = sqlite_path(uri)
    return None if database is None else database.resolve().parent / ARTIFACTS


def how_to_open(uri: str, *, experiment_id: str = "") -> str:
    """Return the address of a server, or the command line that shows any other store at a port that is free now.

    Args:
        uri: the store.
        experiment_id: the experiment whose runs the address shows; empty: the first page.
    """
    page = f"/#/experiments/{experiment_id}?{WORKFLOW}" if experiment_id else ""
    if not uri.startswith((*DATABASES, "file:")):
        return redact(uri).rstrip("/") + page if uri.startswith(SERVERS) else redact(uri)
    here = shutil.which("mlflow")
    is_ours = here is not None and Path(here).parent == Path(sys.executable).parent
    program = ["mlflow"] if is_ours else [sys.executable, "-m", "mlflow"]
    database, port, change = sqlite_path(uri), free_ui_port(), ""
    if database is not None and "%" in uri:  # MLflow would also make a folder of the name that is written in the URI
        change, uri = f"cd {shlex.quote(str(database.parent))} && ", f"sqlite:///{uri.rpartition('/')[2]}"
    command = shlex.join([*program, "ui", "--backend-store-uri", redact(uri), "--port", str(port)])
    return f"{change}{command}  # then open http://127.0.0.1:{port}{page}"


def free_ui_port() -> int:
    """Return the first port, from MLflow's own on, at which no process of this machine listens."""
    for port in UI_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return UI_PORTS[0]

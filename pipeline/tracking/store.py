"""Open an MLflow store: a server, or a SQLite file that several runs write to. Only the sending thread does this.

MLflow makes the tables of a SQLite file step by step and without a lock, so that two runs that start
at once, or one that is killed, can leave a file that no version opens. Here a new file gets its name
when it is complete, and one process at a time opens a file or writes to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from pipeline.redaction import printable
from pipeline.tracking.address import sqlite_path
from pipeline.tracking.place import ARTIFACTS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 16 << 20
LOCK_SECONDS = 20.0  # of waiting for another run
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # the sending thread retries; a retry inside a request could create a run twice
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",  # only the configured server is trusted
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print a password in the address
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PGCONNECT_TIMEOUT": "10",  # of libpq
}
# what an error says -> what to do about it; the first match counts
_ADVICE = (
    (r"not a database|malformed|encrypted", "move {file} away: a new one is made, and all records are sent to it"),
    (r"another program's", "set tracking.uri"),
    (r"is locked|is writing", "end the program that holds {file}"),
    (r"out-of-date database schema", "copy the database, then run mlflow db upgrade '{uri}'"),
    (r"Can't locate revision", "install the version of mlflow that wrote it, or a newer one"),
    (r"experiment .* deleted", "run mlflow experiments restore, or set tracking.experiment"),
    (r"No module named|cannot import", "install the package with pip"),
    (r"\b40[13]\b|Unauthorized|Forbidden|password|authenti", "check user, password and {setting}"),
    (r"No space|is full", "free some disk space"),
    (r"readonly|Permission|unable to open", "give this user write access to {file}"),
)


class StoreError(Exception):
    """A store that is there but cannot be used."""


def advice(error: BaseException, *, uri: str, setting: str) -> str:
    """Return what a user can do about an error of a store.

    Args:
        error: what was raised while a store was opened or written.
        uri: the store, without a password.
        setting: the key or variable that names the store.
    """
    said = one_line(error)
    database = sqlite_path(uri)
    found = next((do for pattern, do in _ADVICE if re.search(pattern, said, re.IGNORECASE)), "")
    if not found:
        found = "check {file}" if database else "start the server, or correct {setting}"
    return found.format(file=database or uri, uri=uri, setting=setting)


def one_line(error: BaseException) -> str:
    """Return the first line of the first cause, without passwords, for example "[Errno 111] Connection refused"."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return printable(first, max_characters=300)


def import_mlflow() -> None:
    """Import mlflow with short time-outs and without log messages of its own; a second call does nothing."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking  # noqa: F401
    from mlflow.store.db import utils

    _cap_answers()
    utils.MAX_RETRY_COUNT = 1  # the sending thread retries; this would sleep for minutes
    utils._make_parent_dirs_if_sqlite = _make_parent  # MLflow's own takes %3F in an address for the name of a folder
    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # SpooledTracker warns once per outage


def connect(uri: str) -> MlflowClient:
    """Return a client of the store. A server is not contacted, a database is."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def disconnect(client: MlflowClient) -> None:
    """Close the connections to a database, whose file may be another one when it is opened again."""
    engine = getattr(client._tracking_client.store, "engine", None)
    if engine is not None:
        engine.dispose()


@contextlib.contextmanager
def only_writer(database: Path | None) -> Iterator[None]:
    """Be the only process of this project that opens or writes ``database`` in the block; None: there is no file.

    SQLite's own locks would make one of two writers fail instead of wait.

    Raises:
        StoreError: another process holds the file for too long.
    """
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    path = database.with_name(f".{database.name}.lock")
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _wait_for_lock(descriptor, database)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a fork has the descriptor too
        os.close(descriptor)


def _wait_for_lock(descriptor: int, database: Path) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(f"another run is writing to {database} for {LOCK_SECONDS:g} s") from None
            time.sleep(0.02)
        except OSError as error:
            logger.debug("%s: this file system has no locks: %s", database, error)
            return


def prepare_database(database: Path) -> None:
    """Make the tables of a new SQLite file, or check an existing one. Call it as :func:`only_writer`.

    Raises:
        StoreError: the file belongs to another program.
        sqlite3.Error: it is damaged or cannot be read.
    """
    tables = _tables(database) if database.exists() and database.stat().st_size else set()
    if not tables:
        _make(database)
    elif not tables & {"alembic_version", "experiments"}:
        raise StoreError(f"{database} is another program's database")
    else:
        correct_artifact_locations(database)


def _open(database: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=LOCK_SECONDS))


def _tables(database: Path) -> set[str]:
    with _open(database) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _make(database: Path) -> None:
    """Make a store in memory, where MLflow's hundred migrations take a second, and save it under its name at once."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = database.with_name(f".{database.name}.new")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    temporary.touch(0o666)  # less the umask: a group may share the database, and SQLite would make it 0o644
    store = SqlAlchemyStore("sqlite:///:memory:", (database.parent / ARTIFACTS).as_uri())
    source = store.engine.raw_connection()
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as saved:
            source.driver_connection.backup(saved)
    finally:
        source.close()
        store.engine.dispose()
    temporary.replace(database)


def correct_artifact_locations(database: Path) -> None:
    """Let experiments and runs whose artifacts lie beside the database point to them after the folder was moved.

    MLflow stores absolute paths. A location elsewhere that exists, with none of the artifacts here, is left alone.
    """
    here = database.parent / ARTIFACTS
    with _open(database) as connection, connection:
        for experiment, location in connection.execute(
            "SELECT experiment_id, artifact_location FROM experiments"
        ).fetchall():
            found = _split_location(location)
            if found is None or found[0] == here:
                continue
            old, inner = found
            rows = connection.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)
            ).fetchall()
            if old.exists() and not any((here / inner / run).is_dir() for run, _ in rows):
                continue
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                ((here / inner).as_uri(), experiment),
            )
            for run, uri in rows:
                place = _split_location(uri)
                if place is None or place[0] != old or ((old / place[1]).exists() and not (here / place[1]).exists()):
                    continue
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", ((here / place[1]).as_uri(), run)
                )


def _split_location(location: str | None) -> tuple[Path, str] | None:
    """Split a local place of artifacts into the folder ``…/mlartifacts`` and the path in it; None for another place."""
    if not location:
        return None
    if location.startswith("file:"):
        path = Path(unquote(urlsplit(location).path))
    elif location.startswith("/"):
        path = Path(location)
    else:
        return None
    for folder in (path, *path.parents):
        if folder.name == ARTIFACTS:
            return folder, str(path.relative_to(folder))
    return None


def _make_parent(uri: str) -> None:
    database = sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)


def is_of_database(error: BaseException) -> bool:
    """Return whether the database failed, and not one record: MLflow calls both BAD_REQUEST."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.startswith("sqlalchemy."):
            return type(cause).__name__ not in ("IntegrityError", "DataError")
        cause = cause.__cause__ or cause.__context__
    return False


def _cap_answers() -> None:
    """Limit the size of answers: MLflow reads them completely, so an endless one would fill the memory."""
    from mlflow.utils import request_utils

    class CappedAdapter(request_utils.TCPKeepAliveHTTPAdapter):  # type: ignore[misc]
        """Raises ConnectionError for an answer that is too large."""

        def send(self, request: Any, **options: Any) -> Any:
            response = super().send(request, **{**options, "stream": True})
            content = b""
            with contextlib.closing(response):
                for piece in response.iter_content(1 << 20):
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES:
                        raise ConnectionError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
            response._content, response._content_consumed = content, True
            return response

    if request_utils.TCPKeepAliveHTTPAdapter.__name__ != CappedAdapter.__name__:
        request_utils.TCPKeepAliveHTTPAdapter = CappedAdapter

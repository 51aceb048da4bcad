"""``metrics.jsonl``: everything that a run reports, one JSON object per line, in the order of the calls.

The file is both the local record and the queue to MLflow: what is on disk survives an outage and a
killed process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, PermissionDenied, WriteError
from pipeline.files import cannot_write

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
ACKNOWLEDGED_NAME = "metrics.sent.json"
_NUMBER, _NOT_FINITE = (int, float), ("nan", "inf", "-inf")
# the field that gives away the kind of a record -> all fields that it must have, and their types
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "step": {"step": (int,), "metrics": (dict,), "time": _NUMBER},
    "run": {"run": (str,), "name": (str,), "experiment": (str,), "time": _NUMBER},
    "child": {"child": (str,), "params": (dict,), "metrics": (dict,), "time": _NUMBER},
    "params": {"params": (dict,)},
    "tags": {"tags": (dict,)},
    "layers": {"layers": (dict,), "after_step": (int,)},
    "resumed_from_step": {"resumed_from_step": (int,)},
    "artifact": {"artifact": (str,)},
    "input": {"input": (str,), "digest": (str,), "context": (str,), "source": (str,), "profile": (dict,)},
    "status": {"status": (str,), "time": _NUMBER},
}


class Journal:
    """Append records to ``metrics.jsonl``, from one process at a time; several of its threads may.

    Raises:
        WriteError: another process has opened the journal of this folder, or it cannot be written.
        PermissionDenied: this user may not write it.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE_NAME
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except PermissionError as error:
            raise PermissionDenied(
                f"{self.path}: cannot be written: {error.strerror}", do="choose another output_dir"
            ) from error
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written: {error.strerror}", do="choose another output_dir"
            ) from error
        self.is_closed = False
        self._turn = threading.Lock()
        self._lock()
        if self.num_bytes and os.pread(self._file, 1, self.num_bytes - 1) != b"\n":
            # the last process was killed while writing a line: separate that line from the next one
            os.write(self._file, b"\n")

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._file).st_size

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise WriteError(
                f"{self.path}: another process is writing to it",
                do="wait for that run to end, or choose another output_dir",
            ) from error
        except OSError as error:
            logger.debug("%s: this file system has no locks: %s", self.path, error)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line with a single system call, so that a killed process loses at most that line."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with self._turn:
            before = self.num_bytes
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, before)
                raise cannot_write(self.path, error, num_bytes=len(line)) from error

    def sync(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if not self.is_closed:
            self.is_closed = True
            os.close(self._file)


def read_batch(path: Path, offset: int, *, max_metrics: int) -> tuple[list[dict[str, Any]], int]:
    """Read the next batch: a single record of any kind, or several consecutive records of metrics.

    Args:
        path: the journal.
        offset: byte at which to start.
        max_metrics: most metrics in a batch of several records.

    Returns:
        The records and the offset after them; ``([], offset)`` at the end of the file.
    """
    batch: list[dict[str, Any]] = []
    num_metrics = 0
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # still being written
            record = _parse(path, line)
            is_metrics = "step" in record
            num_metrics += len(record["metrics"]) if is_metrics else 0
            if batch and record and (not is_metrics or num_metrics > max_metrics):
                break
            offset += len(line)
            if record:
                batch.append(record)
                if not is_metrics:
                    break
    return batch, offset


def read_records(output_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run in the order of the calls, without damaged lines; none if it has no journal."""
    path = output_dir / FILE_NAME
    with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
        yield from filter(None, (_parse(path, line, level=logging.DEBUG) for line in lines))


def require_journal(output_dir: Path) -> None:
    """Check that ``output_dir`` is the folder of a run.

    Raises:
        ConfigError: it does not exist or has no ``metrics.jsonl``.
    """
    path = output_dir / FILE_NAME
    if path.is_file():
        return
    if not output_dir.exists():
        what = f"{output_dir}: does not exist"
    else:
        what = f"{path}: is not a regular file" if path.exists() else f"{output_dir}: has no {FILE_NAME}"
    raise ConfigError(what, do="pass the output_dir of a run")


def count_records(path: Path, offset: int) -> int:
    """Count the lines after byte ``offset``."""
    with path.open("rb") as lines:
        lines.seek(offset)
        return sum(1 for _ in lines)


def _parse(path: Path, line: bytes, *, level: int = logging.WARNING) -> dict[str, Any]:
    """Parse one record; empty for a line that is damaged, or that a killed process left unfinished."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and _is_complete(record):
        return record
    logger.log(level, "%s: skipping an unfinished or damaged line of %d bytes", path, len(line))
    return {}


def _is_complete(record: dict[str, Any]) -> bool:
    """Return whether the record has all fields of its kind; a record of an unknown kind passes and is ignored later."""
    needed = next((fields for kind, fields in _FIELDS.items() if kind in record), {})
    if not all(type(record.get(name)) in kinds for name, kinds in needed.items()):
        return False
    numbers = record["metrics"].values() if "metrics" in needed else ()
    texts = [value for name in ("params", "tags") if name in needed for value in record[name].values()]
    return all(type(value) in _NUMBER or value in _NOT_FINITE for value in numbers) and all(
        type(value) is str for value in texts
    )


@dataclass
class Acknowledged:
    """How much of the journal a server has, and what is needed to continue there; saved beside the journal."""

    uri: str  # without password; empty: mlflow.db in the run's folder, wherever that folder is
    num_bytes: int = 0  # of the journal that the server has
    run: str = ""  # its name in the journal
    run_id: str = ""  # its id on the server
    experiment_id: str = ""
    children: dict[str, str] = field(default_factory=dict)  # name -> run id
    last_step: dict[str, int] = field(default_factory=dict)  # metric key -> highest step sent
    # metric key -> highest step sent before the last resume
    repeated_until: dict[str, int] = field(default_factory=dict)
    folder: str = ""  # of the run when this was saved
    copied_from: list[str] = field(default_factory=list)  # names and ids of the runs that this one is a copy of

    @classmethod
    def load(cls, output_dir: Path) -> Acknowledged | None:
        """Load what was saved last; None when nothing usable is saved.

        Then all records are sent again, which is harmless because the server ignores repeats.
        """
        path = output_dir / ACKNOWLEDGED_NAME
        try:
            acknowledged = cls(**json.loads(path.read_bytes()))
            if [type(value) for value in vars(acknowledged).values()] != [
                type(value) for value in vars(cls("")).values()
            ]:
                raise TypeError("a value has the wrong type")
            is_of_this_journal = 0 <= acknowledged.num_bytes <= (output_dir / FILE_NAME).stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: cannot be read, so all records are sent again: %s", path, error)
            return None
        return acknowledged if is_of_this_journal else None

    def save(self, output_dir: Path) -> None:
        """Replace the file atomically."""
        self.folder = str(output_dir.resolve())
        temporary = output_dir / f".{ACKNOWLEDGED_NAME}.tmp"
        with temporary.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output_dir / ACKNOWLEDGED_NAME)

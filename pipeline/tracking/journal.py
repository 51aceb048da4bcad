"""``metrics.jsonl``: everything a run reports, one JSON object per line, in the order of the calls.

The file is the local truth and at the same time the queue towards MLflow: what is on disk outlives
an outage and a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PermissionDenied, WriteError
from pipeline.files import cannot_write

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
ACKNOWLEDGED_NAME = "metrics.sent.json"
_NUMBER, _NOT_FINITE = (int, float), ("nan", "inf", "-inf")
_FIELDS: dict[
    str, dict[str, tuple[type, ...]]
] = {  # the name that tells the kind of a record -> what else there must be
    "step": {"step": (int,), "metrics": (dict,), "time": _NUMBER},
    "run": {"run": (str,), "name": (str,), "experiment": (str,), "time": _NUMBER},
    "child": {"child": (str,), "params": (dict,), "metrics": (dict,), "time": _NUMBER},
    "params": {"params": (dict,)},
    "tags": {"tags": (dict,)},
    "resumed_from_step": {"resumed_from_step": (int,)},
    "artifact": {"artifact": (str,)},
    "status": {"status": (str,), "time": _NUMBER},
}


class Journal:
    """The append side. One process at a time: a second one that opens the same folder gets a :class:`WriteError`."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE_NAME
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except PermissionError as error:
            raise PermissionDenied(
                f"{self.path}: cannot be written: {error.strerror}", do="choose another output_dir"
            ) from error
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written: {error.strerror}", do="choose another output_dir"
            ) from error
        self.is_closed = False
        self._lock()
        if self.num_bytes and os.pread(self._file, 1, self.num_bytes - 1) != b"\n":
            os.write(
                self._file, b"\n"
            )  # the last process was killed inside a line: keep the torn line apart from the next one

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file).st_size

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise WriteError(
                f"{self.path}: another process writes it", do="wait for that run to end, or choose another output_dir"
            ) from error
        except OSError as error:
            logger.debug("%s: this file system has no locks: %s", self.path, error)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line with one system call, so that a kill loses at most the line being written."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        before = self.num_bytes
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise cannot_write(self.path, error, num_bytes=len(line)) from error

    def sync(self) -> None:
        """Put what was appended on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            os.close(self._file)


def read_batch(path: Path, offset: int, *, max_metrics: int) -> tuple[list[dict[str, Any]], int]:
    """The records that follow byte ``offset``, and the offset after them; ``([], offset)`` at the end of the file.

    A batch is either one record, or several neighbours that are all metrics, at most
    ``max_metrics`` of them unless one record has more.
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


def count_records(path: Path, offset: int) -> int:
    """Number of lines after byte ``offset``."""
    with path.open("rb") as lines:
        lines.seek(offset)
        return sum(1 for _ in lines)


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    """One record, empty for a line that a killed process left unfinished, or that is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and _is_whole(record):
        return record
    logger.warning("%s: an unfinished or damaged line of %d bytes is skipped", path, len(line))
    return {}


def _is_whole(record: dict[str, Any]) -> bool:
    """Does the record hold what its kind needs? One of no known kind is passed on, and applied by nobody."""
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
    """How far into the journal a server is up to date, and what must be known there to go on.

    Kept beside the journal.
    """

    uri: str  # without password; empty: the SQLite store in the run's folder
    num_bytes: int = 0
    run: str = ""  # as the journal calls it
    run_id: str = ""
    experiment_id: str = ""
    children: dict[str, str] = field(default_factory=dict)  # name -> run id
    last_step: dict[str, int] = field(default_factory=dict)  # metric key -> highest step sent
    repeated_until: dict[str, int] = field(
        default_factory=dict
    )  # metric key -> highest step sent before the last resume

    @classmethod
    def load(cls, output_dir: Path) -> Acknowledged | None:
        """What was saved last; None when there is nothing usable, which only means that everything is sent once more, without effect."""
        path = output_dir / ACKNOWLEDGED_NAME
        try:
            acknowledged = cls(**json.loads(path.read_bytes()))
            if [type(value) for value in vars(acknowledged).values()] != [
                type(value) for value in vars(cls("")).values()
            ]:
                raise TypeError("a value of another type")
            is_of_this_journal = 0 <= acknowledged.num_bytes <= (output_dir / FILE_NAME).stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s: unreadable, starting at the first record: %s", path, error)
            return None
        return acknowledged if is_of_this_journal else None

    def save(self, output_dir: Path) -> None:
        """Replace the file in one step."""
        temporary = output_dir / f".{ACKNOWLEDGED_NAME}.tmp"
        with temporary.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output_dir / ACKNOWLEDGED_NAME)

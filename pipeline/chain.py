"""``chain.jsonl``: what a run computed, in records of which each is hashed together with all before it.

Each line is a JSON object with ``kind``, ``step`` (optimiser steps done), what the kind says, and
``link``: the sha256 of the link of the line before and of this line without its link. So a line that
is changed, left out or moved no longer fits the lines after it, and two runs with equal last links
computed the same. There is no time and no name of a machine's folder in it: a run that is stopped and
resumed on the same kind of machine ends with the same lines as one that is not.

The chain proves that the log is of one piece, not that the run took place: whoever holds the file can
compute all links anew. See docs/verification.md. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.files import cannot_read, cannot_write, describe_json, parse_json, read_capped, write_atomically

logger = logging.getLogger(__name__)

NAME = "chain.jsonl"
FORMAT = 1
UNCHANGED = "get an unchanged copy of the run"
MAX_BYTES = 256 << 20  # a million steps, reported every 50, take 10 MB
START, REPORT, CHECKPOINT, TICKET, END = "start", "report", "checkpoint", "ticket", "end"
# what each kind of record says besides kind, step and link, and of which type
FIELDS: dict[str, dict[str, type]] = {
    # how the run computes: at its start, and again where a resume has changed any of it
    START: {
        "format": int,
        "config_digest": str,
        "settings": dict,
        "data": dict,
        "ranks": int,
        "environment": dict,
    },
    # the network at a report, and all that was reported since the last one: step -> name -> value
    REPORT: {"state": str, "metrics": dict},
    # everything that a resume needs: what all ranks share, and what each has for itself
    CHECKPOINT: {"shared": str, "ranks": str},
    TICKET: {"tickets": dict},  # last or best -> digest of the ticket without the name of its run
    END: {"files": dict, "metrics": dict},  # the report: path in the run's folder -> digest
}
POSITION: dict[str, type] = {"link": str, "num_records": int, "pending": dict}
Record = dict[str, Any]


class Chain:
    """Appends records to a run's ``chain.jsonl``.

    On the ranks that have no file (``path`` None), nothing is written, and everything else works.

    Args:
        path: the file; None on all ranks but the first.
        position: what :meth:`position` returned when the checkpoint was saved from which the run
            resumes. Records after it are removed: the run writes them again. None starts a new chain.
    """

    def __init__(self, path: Path | None, position: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self.link, self.num_records = "", 0
        self._pending: dict[str, dict[str, float | str]] = {}
        self._start: Record = {}  # the last record of this kind, without kind, step and link
        if path is None:
            return
        kept = b""
        if position is not None:
            kept = self._continued(path, position)
        write_atomically(path, kept)

    def _continued(self, path: Path, position: Mapping[str, Any]) -> bytes:
        """Take over what was there at ``position``; return its bytes, or none with a warning if it is not there."""
        number = int(position["num_records"])
        try:
            records = read_chain(path, first=number)
            if len(records) != number or (records[-1]["link"] if records else "") != position["link"]:
                raise IntegrityError(f"{path}: does not begin with the {number} records of the checkpoint")
        except IntegrityError as error:
            logger.warning("%s; a new chain starts here, and what was before cannot be verified", error.what)
            return b""
        self.link, self.num_records = str(position["link"]), number
        self._pending = {step: dict(found) for step, found in position["pending"].items()}
        for record in records:
            if record["kind"] == START:
                self._start = content_of(record)
        return b"".join(_line(record) for record in records)

    @property
    def is_new(self) -> bool:
        """Whether there is no record yet."""
        return not self.num_records

    def start(self, step: int, **content: Any) -> None:
        """Record how the run computes from ``step`` on, unless nothing of it has changed."""
        if content != self._start:
            self.add(START, step, **content)
            self._start = content

    def note(self, step: int, values: Mapping[str, float | str]) -> None:
        """Keep what was reported after run step ``step`` for the next record that has ``metrics``."""
        plain = {key: value if isinstance(value, str) else plain_number(value) for key, value in values.items()}
        self._pending.setdefault(str(step), {}).update(plain)

    def add(self, kind: str, step: int, **content: Any) -> None:
        """Append a record after ``step`` steps.

        Raises:
            WriteError, PermissionDenied: it cannot be written.
        """
        if self._path is None:
            return
        if "metrics" in FIELDS[kind]:
            content["metrics"], self._pending = self._pending, {}
        record: Record = {"kind": kind, "step": step, **content}
        record["link"] = link_of(self.link, record)
        line = _line(record)
        try:
            with self._path.open("ab", buffering=0) as file:  # one system call, so that a kill leaves a whole line
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._path, error, num_bytes=len(line)) from error
        self.link, self.num_records = record["link"], self.num_records + 1

    def position(self) -> dict[str, Any]:
        """Return where the chain stands, for a checkpoint: plain values of JSON."""
        return {"link": self.link, "num_records": self.num_records, "pending": self._pending}

    def sync(self) -> None:
        """Wait until all records are on disk.

        Raises:
            WriteError, PermissionDenied: they cannot be written.
        """
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error


def plain_number(value: float) -> float | str:
    """Return a number as JSON has it; "nan", "inf" and "-inf" for those that JSON lacks, as the journal does."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def canonical(content: Mapping[str, Any]) -> str:
    """Return JSON in the one form that is hashed: names sorted, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def link_of(previous: str, record: Mapping[str, Any]) -> str:
    """Return the link of a record: sha256 (hex) of the link before it and of the record without its own."""
    content = {key: value for key, value in record.items() if key != "link"}
    return hashlib.sha256(f"{previous}\n{canonical(content)}".encode()).hexdigest()


def content_of(record: Mapping[str, Any]) -> Record:
    """Return what a record says, without kind, step and link."""
    return {key: value for key, value in record.items() if key not in ("kind", "step", "link")}


def _line(record: Mapping[str, Any]) -> bytes:
    return (canonical(record) + "\n").encode()


def read_chain(path: Path, *, first: int | None = None) -> list[Record]:
    """Read a chain and check every link, the form of every record and the order of the steps.

    Args:
        path: the file.
        first: number of records to read; None: all.

    Raises:
        IntegrityError: it is not a whole chain; the message names the line.
        WriteError, PermissionDenied: it cannot be read.
    """
    try:
        lines = read_capped(path, MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        raise IntegrityError(f"{path}: does not exist") from None
    except OSError as error:
        raise cannot_read(path, error) from error
    except ValueError as error:
        raise IntegrityError(f"{path}: {error}") from None
    last = lines.pop()
    lines = lines[:first]
    if last and (first is None or len(lines) < first):
        what = f"{path}: line {len(lines) + 1} has no end: it is cut off, or still being written"
        raise IntegrityError(what, do=UNCHANGED)
    return checked(lines, path)


def checked(lines: Iterable[bytes], path: Path) -> list[Record]:
    """Parse lines and check that they are a chain; see :func:`read_chain`."""
    records: list[Record] = []
    link, step = "", 0
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {describe_json(record)}")
            _check_fields(record)
            if record["step"] < step:
                raise ValueError(f"step {record['step']} comes after step {step}")
            if record["link"] != link_of(link, record):
                raise ValueError("its link is not that of this record and the one before: one of them was changed")
            if line != _line(record)[:-1]:
                raise ValueError("it is not written in the form that is hashed")
            if (record["kind"] == START) < (number == 1):
                raise ValueError(f"the first record is of kind {record['kind']!r}, expected {START!r}")
            if records and records[-1]["kind"] == END:
                raise ValueError("there are records after the end of the run")
        except ValueError as error:
            raise IntegrityError(f"{path}: line {number}: {error}", do=UNCHANGED) from None
        records.append(record)
        link, step = record["link"], record["step"]
    return records


def _check_fields(record: Mapping[str, Any]) -> None:
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(f"kind: expected one of {', '.join(FIELDS)}, got {describe_json(kind)}")
    expected = {"kind": str, "step": int, "link": str, **FIELDS[kind]}
    if odd := sorted(record.keys() ^ expected.keys()):
        raise ValueError(f"{odd[0][:40]!r} is {'missing' if odd[0] in expected else 'not a field of this kind'}")
    for name, kind_of in expected.items():
        if type(record[name]) is not kind_of or (kind_of is int and record[name] < 0):
            raise ValueError(f"{name}: got {describe_json(record[name])}")
    if kind == START and record["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {record['format']}: it is of another version of ticketworks")


def position_problem(position: Any) -> str:
    """Return what is wrong with what a checkpoint says of the chain; empty if nothing is, or it says nothing."""
    if not position:
        return ""
    if not isinstance(position, dict) or position.keys() != POSITION.keys():
        return f"chain: expected {', '.join(POSITION)}"
    for name, kind in POSITION.items():
        if type(position[name]) is not kind or (kind is int and position[name] < 0):
            return f"chain: {name}: got {describe_json(position[name])}"
    values = position["pending"].values()
    return "" if all(isinstance(value, dict) for value in values) else "chain: pending: expected objects"

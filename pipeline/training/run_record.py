"""``run.json``: the run that a folder belongs to. Standard library only."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path

from pipeline.errors import IntegrityError, RunError, WriteError
from pipeline.files import open_regular, parse_json, read_capped, write_atomically

NAME = "run.json"
RESULTS = ("checkpoints", "tickets", "report")  # folders of what a run makes
CLAIM, METRICS = "owner.json", "metrics.jsonl"  # of pipeline.tickets and pipeline.tracking


def write_run_id(folder: Path, name: str) -> None:
    """Give the folder to a run called ``name``.

    One of this name that is there already, and has not got anywhere (:func:`is_occupied`), is taken
    up: what it has claimed elsewhere is then its own.

    Raises:
        WriteError, PermissionDenied: the record cannot be written.
    """
    with contextlib.suppress(FileNotFoundError, IntegrityError):
        if read_run_id(folder).rpartition("-")[0] == name:
            return
    (folder / "tickets" / CLAIM).unlink(missing_ok=True)
    write_atomically(folder / NAME, json.dumps({"run_id": f"{name}-{uuid.uuid4().hex[:12]}"}).encode())


def read_run_id(folder: Path) -> str:
    """The run that the folder belongs to. Raises IntegrityError when the record does not say, OSError."""
    try:
        run_id = parse_json(read_capped(folder / NAME, 1 << 16))["run_id"]
        if isinstance(run_id, str) and run_id.isprintable() and len(run_id) <= 128:
            return run_id
    except (ValueError, TypeError, KeyError):
        pass
    raise IntegrityError(
        f"{folder / NAME}: does not name the run of this folder",
        do="choose another output_dir, or resume from a copy of this one",
    )


def is_occupied(folder: Path) -> bool:
    """Whether the folder holds a run that has got anywhere: a checkpoint, a ticket, a report or a step in its record.

    A start that failed before that leaves nothing to lose, and the folder may be used again.
    """
    if not (folder / NAME).exists():
        return False
    results = [path for name in RESULTS if (folder / name).exists() for path in (folder / name).iterdir()]
    if any(path.name != CLAIM for path in results):
        return True
    try:
        with open_regular(folder / METRICS) as lines:
            return any(_is_of_a_step(line) for line in lines)
    except FileNotFoundError:
        return False
    except ValueError:  # not a regular file: no start has left that
        return True


def _is_of_a_step(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        record = parse_json(line)
        return isinstance(record, dict) and "step" in record
    return False  # it was killed within this line


def occupied(folder: Path, *, who: str = "") -> WriteError:
    """The error for another run that wants the folder: whose it is and, if anybody is, ``who`` is at work there."""
    try:
        owner = f"run {read_run_id(folder)}"
    except (OSError, RunError):
        owner = "a run"
    at_work = f", and {who} is at work here" if who else ""
    return WriteError(
        f"{folder}: already holds {owner}{at_work}", do="continue it with --resume auto, or choose another output_dir"
    )

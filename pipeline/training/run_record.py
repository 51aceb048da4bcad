"""``run.json``: the identity of the run that a folder belongs to. Needs only the standard library."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path

from pipeline.errors import IntegrityError, RunError, WriteError
from pipeline.files import open_regular, parse_json, read_capped, write_atomically

NAME = "run.json"
RESULTS = ("checkpoints", "tickets", "report")  # folders of results
CLAIM, METRICS = "owner.json", "metrics.jsonl"  # written by pipeline.tickets and pipeline.tracking


def write_run_id(folder: Path, name: str) -> None:
    """Record that the folder belongs to a run called ``name``, with a new id.

    If it already belongs to a run of this name, the id is kept, so that what that run has claimed
    elsewhere stays its own. Call this only if the folder is not occupied (:func:`is_occupied`).

    Raises:
        WriteError, PermissionDenied: the record cannot be written.
    """
    with contextlib.suppress(FileNotFoundError, IntegrityError):
        if read_run_id(folder).rpartition("-")[0] == name:
            return
    (folder / "tickets" / CLAIM).unlink(missing_ok=True)
    write_atomically(folder / NAME, json.dumps({"run_id": f"{name}-{uuid.uuid4().hex[:12]}"}).encode())


def read_run_id(folder: Path) -> str:
    """Return the id of the run that the folder belongs to.

    Raises:
        IntegrityError: the record is not valid.
        OSError: the record cannot be read.
    """
    try:
        run_id = parse_json(read_capped(folder / NAME, 1 << 16))["run_id"]
        if isinstance(run_id, str) and run_id.isprintable() and len(run_id) <= 128:
            return run_id
    except (ValueError, TypeError, KeyError):
        pass
    raise IntegrityError(
        f"{folder / NAME}: does not name the run that this folder belongs to",
        do="choose another output_dir, or resume from a copy of this one",
    )


def is_occupied(folder: Path) -> bool:
    """Return whether the folder contains results: a checkpoint, a ticket, a report or the metrics of a step.

    A run that failed before its first step leaves no results, and its folder may be used again.
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
    except ValueError:  # not a regular file: it was not written by a run
        return True


def _is_of_a_step(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        record = parse_json(line)
        return isinstance(record, dict) and "step" in record
    return False  # the run was killed while writing this line


def occupied(folder: Path, *, who: str = "") -> WriteError:
    """Return the error for a folder that belongs to another run.

    ``who`` describes the process that is using it; empty: there is none.
    """
    try:
        owner = f"run {read_run_id(folder)}"
    except (OSError, RunError):
        owner = "a run"
    in_use = f", in use by {who}" if who else ""
    return WriteError(
        f"{folder}: already holds {owner}{in_use}", do="continue it with --resume auto, or choose another output_dir"
    )

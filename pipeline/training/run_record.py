"""``run.json``: the run that a folder belongs to. Standard library only."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from pipeline.errors import IntegrityError, RunError, WriteError
from pipeline.files import parse_json, read_capped, write_atomically

NAME = "run.json"


def write_run_id(folder: Path, name: str) -> None:
    """Give the folder to a new run called ``name``. Raises WriteError, PermissionDenied."""
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

"""Is a folder a checkpoint that can be resumed from? Without torch: a wrong ``--resume`` is named in a second.

What is in a checkpoint: :mod:`pipeline.checkpoint.checkpoints`.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from pipeline.files import cannot_read, parse_json, read_capped, sha256_of

FORMAT = 1
FOLDER = re.compile(r"step-([0-9]{8,12})")
MAX_JSON_BYTES = 16 << 20  # state.json of a run on 100 ranks: 100 kB
MAX_RANKS = 1 << 20
NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_STATE = {
    "format": int,
    "step": int,
    "samples_seen": int,
    "world_size": int,
    "environment": dict,
    "config": dict,
    "data_digest": str,
    "sparsifier": dict,
    "tracker_run": str,
    "arithmetic": int,
}


def files_of(world_size: int) -> set[str]:
    """What a checkpoint has beside its manifest."""
    return {"state.json", "state.safetensors", *(f"rank-{rank}.safetensors" for rank in range(world_size))}


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders with the name of a checkpoint, the newest step first. Raises as :func:`what_is_wrong`."""
    try:
        found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name)]
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(folder, error) from error
        found = []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_state(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says.

    Raises ValueError with the reason when it cannot be believed, OSError when it cannot be read.
    """
    state = parse_json(read_capped(folder / "state.json", MAX_JSON_BYTES))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("it has another format than this version reads")
    state.setdefault("arithmetic", 0)  # version 0.1 does not record it
    for key, kind in _STATE.items():
        if type(state.get(key)) is not kind or (kind is int and state[key] < 0):
            raise ValueError(f"its state has no valid {key!r}")
    if not 1 <= state["world_size"] <= MAX_RANKS:
        raise ValueError(f"its state tells of {state['world_size']} ranks")
    return state


def what_is_wrong(folder: Path) -> str:
    """Why ``folder`` is not a valid checkpoint; empty when it is one. Reads and hashes every file.

    Raises:
        WriteError, PermissionDenied: it cannot be read now, and may be valid: nothing older must take its place.
    """
    try:
        manifest = parse_json(read_capped(folder / "manifest.json", MAX_JSON_BYTES))
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict):
            return "its manifest names no files"
        state = read_state(folder)
        if len(files) != 2 + state["world_size"] or set(files) != files_of(state["world_size"]):
            return f"its manifest names {', '.join(sorted(files)[:8])}"
        for name, digest in files.items():
            actual = sha256_of(folder / name)
            if actual != digest:
                return f"{name} has another sha256 than its manifest says ({str(digest)[:12]}…)"
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(Path(error.filename or folder), error) from error
        return f"it is incomplete ({Path(str(error.filename)).name}: {error.strerror})"
    except ValueError as error:
        return f"it is damaged ({error})"
    return ""

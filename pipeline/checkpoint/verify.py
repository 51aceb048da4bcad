"""Check that a folder is a checkpoint that a run can resume from.

Does not import torch, so that a wrong ``--resume`` is reported within a second. The content of a
checkpoint is described in :mod:`pipeline.checkpoint.checkpoints`.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from pipeline.files import cannot_read, parse_json, read_capped, sha256_of

FORMAT = 1
FOLDER = re.compile(r"step-([0-9]{8,12})")
MAX_JSON_BYTES = 16 << 20  # state.json of a run on 100 ranks has 100 kB
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
    """Return the names of a checkpoint's files, without its manifest."""
    return {"state.json", "state.safetensors", *(f"rank-{rank}.safetensors" for rank in range(world_size))}


def checkpoints_in(folder: Path) -> list[Path]:
    """List the folders that have the name of a checkpoint, the newest step first.

    Raises:
        WriteError, PermissionDenied: ``folder`` cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name)]
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(folder, error) from error
        found = []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read and check ``state.json``.

    Raises:
        ValueError: it is invalid; the text is the reason.
        OSError: it cannot be read.
    """
    state = parse_json(read_capped(folder / "state.json", MAX_JSON_BYTES))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("its format is not supported by this version")
    state.setdefault("arithmetic", 0)  # version 0.1 does not record it
    for key, kind in _STATE.items():
        if type(state.get(key)) is not kind or (kind is int and state[key] < 0):
            raise ValueError(f"its state has no valid {key!r}")
    if not 1 <= state["world_size"] <= MAX_RANKS:
        raise ValueError(f"its state claims {state['world_size']} ranks")
    return state


def find_damage(folder: Path) -> str:
    """Read and hash every file of a checkpoint; return why it is not valid, or an empty text.

    Raises:
        WriteError, PermissionDenied: it cannot be read now. It may be valid, so a run must not resume
            from an older one instead.
    """
    try:
        manifest = parse_json(read_capped(folder / "manifest.json", MAX_JSON_BYTES))
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict):
            return "its manifest lists no files"
        state = read_state(folder)
        if len(files) != 2 + state["world_size"] or set(files) != files_of(state["world_size"]):
            return f"its manifest lists the wrong files: {', '.join(sorted(files)[:8])}"
        for name, digest in files.items():
            actual = sha256_of(folder / name)
            if actual != digest:
                return f"{name}: expected sha256 {str(digest)[:12]}… as in the manifest, got {actual[:12]}…"
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise cannot_read(Path(error.filename or folder), error) from error
        return f"it is incomplete ({Path(str(error.filename)).name}: {error.strerror})"
    except ValueError as error:
        return f"it is damaged ({error})"
    return ""

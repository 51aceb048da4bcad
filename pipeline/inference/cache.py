"""The user's cache of machine code and tuning; a missing or damaged entry is made anew, and nothing depends on it.

An entry is a file with the sha256 of its content before it. The folder is
``$TICKETWORKS_CACHE``, or ``ticketworks`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It is used only if
it belongs to this user and no other user may write to it: it holds code that is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files import open_regular, write_atomically

MAX_BYTES = 64 * 2**20  # of one entry
VARIABLE = "TICKETWORKS_CACHE"


def cache_folder() -> Path | None:
    """Return the folder, which is made if it is missing; None where it cannot be used."""
    chosen = os.environ.get(VARIABLE)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = Path(chosen) if chosen else base / "ticketworks"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    is_own = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if is_own else None


def load(name: str) -> bytes | None:
    """Return the content of an entry; None if it is missing or damaged."""
    if (folder := cache_folder()) is None:
        return None
    try:
        with open_regular(folder / name) as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            content = file.read(MAX_BYTES + 1)
    except (OSError, RunError, ValueError):
        return None
    digest, body = content[:32], content[32:]
    return body if hashlib.sha256(body).digest() == digest else None


def save(name: str, content: bytes) -> None:
    """Store an entry; a full or read-only disk leaves it out."""
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(RunError, OSError):
            write_atomically(folder / name, hashlib.sha256(content).digest() + content, is_name_durable=False)


def forget(name: str) -> None:
    """Remove an entry."""
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(OSError):
            (folder / name).unlink()

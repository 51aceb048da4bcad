"""Which run owns a folder of tickets: ``owner.json``, there whole or not at all.

Another run is refused, a resumed one goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import IntegrityError, WriteError
from pipeline.files import cannot_write, parse_json, read_capped, sync_folder, write_durably

OWNER_FILE = "owner.json"


def claim_of(owner: str) -> bytes:
    """The content of the owner's file."""
    return json.dumps({"owner": owner, "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode()


def check_claim(content: bytes, owner: str, *, folder: str) -> None:
    """Raises WriteError naming the other owner and since when, IntegrityError when the claim cannot be read."""
    try:
        claim = parse_json(content)
        there, since = claim["owner"], claim["since"]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"{folder}/{OWNER_FILE}: cannot be read as the owner of this folder",
            do="remove it if no run uses the folder",
        ) from None
    if there != owner:
        raise WriteError(
            f"{folder}: belongs to run {str(there)[:80]!r} since {str(since)[:40]}, this is run {owner!r}",
            do="choose another output folder, or remove this one if that run is over and not needed",
        )


def take(folder: Path, owner: str) -> None:
    """Makes the folder and puts our name on it; returns when it is there already.

    The claim is written beside its place and linked to it, which fails when there is one, on
    network storage too: nobody ever sees half a claim, as a process killed in between would leave
    it. Raises WriteError, PermissionDenied, IntegrityError.
    """
    content = claim_of(owner)
    path, temporary = folder / OWNER_FILE, folder / f".{OWNER_FILE}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            raise FileExistsError
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            write_durably(file, content)
        _link(temporary, path)
    except FileExistsError:
        _check_owner(path, owner)
        return
    except OSError as error:
        raise cannot_write(folder, error, num_bytes=len(content)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(folder)


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no links.

    Raises FileExistsError when ``target`` is there.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            write_durably(file, source.read_bytes())


def _check_owner(path: Path, owner: str) -> None:
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent}: is there and is not a folder")
    for attempt in range(
        10
    ):  # where there are no links, a rank that comes at the same moment may find the file still empty
        try:
            check_claim(_read_claim(path), owner, folder=str(path.parent))
            break
        except IntegrityError:
            if attempt == 9:
                raise
            time.sleep(0.1)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise cannot_write(path.parent, PermissionError(errno.EACCES, "Permission denied"), num_bytes=0)


def _read_claim(path: Path) -> bytes:
    try:
        return read_capped(path, 4096)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: cannot be read as the owner of this folder: {error}") from None

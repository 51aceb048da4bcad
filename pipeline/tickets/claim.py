"""Claim a folder of tickets for one run: ``owner.json`` names the run that owns the folder.

Another run is rejected; the same run, resumed, continues.
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
    """Return the content of ``owner.json``."""
    return json.dumps({"owner": owner, "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode()


def check_claim(content: bytes, owner: str, *, folder: str) -> None:
    """Check that a claim names this owner.

    Args:
        content: of ``owner.json``.
        owner: this run.
        folder: the folder or URL to name in an error.

    Raises:
        WriteError: the folder belongs to another run.
        IntegrityError: the claim cannot be read.
    """
    try:
        claim = parse_json(content)
        there, since = claim["owner"], claim["since"]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"{folder}/{OWNER_FILE}: does not name the owner of this folder",
            do="remove it if no run uses the folder",
        ) from None
    if there != owner:
        raise WriteError(
            f"{folder}: has belonged to run {str(there)[:80]!r} since {str(since)[:40]}, but this is run {owner!r}",
            do="choose another output folder, or remove this one if that run has ended and is not needed",
        )


def claim_folder(folder: Path, owner: str) -> None:
    """Create the folder and claim it for ``owner``, or check that it is claimed already.

    The claim is written under a temporary name and then linked to its final one. Linking fails when
    another claim exists, on network storage too, and nobody can see half a claim, not even when
    this process is killed.

    Raises:
        WriteError: the folder belongs to another run, or cannot be written.
        PermissionDenied: this user may not write it.
        IntegrityError: the existing claim cannot be read.
    """
    content = claim_of(owner)
    path, temporary = folder / OWNER_FILE, folder / f".{OWNER_FILE}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            raise FileExistsError
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
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
    """Link ``source`` to ``target``, or copy it where the file system has no links.

    Raises:
        FileExistsError: ``target`` exists.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            write_durably(file, source.read_bytes())


def _check_owner(path: Path, owner: str) -> None:
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent}: is not a folder", do="choose another output folder")
    for attempt in range(10):  # without links, a rank that starts at the same moment may find the file still empty
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
        raise IntegrityError(f"{path}: does not name the owner of this folder: {error}") from None

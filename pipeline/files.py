"""Files that are either whole or not there: durable writes, renames and errors that say what is missing. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import PermissionDenied, RunError, WriteError

CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the whole file or none: written beside its place, made durable, renamed. A left-over temporary file is reused.

    Raises:
        WriteError, PermissionDenied: nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
            write_durably(file, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error, num_bytes=len(content)) from None
    sync_folder(path.parent)


def write_durably(file: BinaryIO, content: bytes) -> None:
    """Write and wait until the bytes are on the disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def write_everything(descriptor: int, content: bytes | memoryview, start: int) -> None:
    """Write all of ``content`` at byte ``start`` of an open file: one call may write less than it was given."""
    left = memoryview(content).cast("B")
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def cannot_write(path: Path, error: OSError, *, num_bytes: int = 0) -> RunError:
    """The error for a failed write: who may not, or how much space is missing."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(f"{path}: user {os.geteuid()} may not write here ({error.strerror})", do="give this user write access")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in path.parents if folder.exists())
        return WriteError(f"{path}: no space: {num_bytes} bytes needed, {shutil.disk_usage(existing).free} free", do="make room and resume")
    return WriteError(f"{path}: cannot be read or written: {error.strerror}", do="check the path")

"""Files that are either whole or not there: durable writes, renames and errors that say what is missing. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import PermissionDenied, RunError, WriteError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
LOCK_NAME, LOCK_SECONDS = "job.lock", 2.0


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


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Be the only process that is at work in ``folder``. However this process ends, the lock goes with it, the file stays.

    Raises:
        WriteError: another process is, by name and since when.
    """
    path = folder / LOCK_NAME
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+b") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    who = " ".join(file.read(200).decode(errors="replace").split()) or "another process"
                    raise WriteError(f"{folder}: {who} is at work here", do="wait for its end, or choose another output_dir") from None
                time.sleep(0.1)  # one that was killed may still be on its way out
            except OSError as error:
                logger.warning("%s: this file system has no locks, so nothing keeps a second job out: %s", path, error.strerror)
                break
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}".encode())
        file.flush()
        yield


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

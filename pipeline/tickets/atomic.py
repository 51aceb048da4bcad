"""Files that appear whole or not at all, and what to say when they cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import PermissionDenied, RunError, WriteError


def write_atomically(path: Path, content: bytes) -> None:
    """Readers see the whole file or none: it is written beside its place, made durable and renamed.

    Raises WriteError (no space: path, needed, free) or PermissionDenied; no partial file stays. What a killed process left is reused.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
            write_durably(file, content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error, num_bytes=len(content)) from None
    sync_folder(path.parent)


def write_durably(file: BinaryIO, content: bytes) -> None:
    """Returns when the content is on the disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes names in a folder durable: a rename is safe only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError, *, num_bytes: int) -> RunError:
    """The error to raise when the operating system refuses to write ``num_bytes`` to ``path``."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(f"{path}: user {os.geteuid()} may not write here ({error.strerror})", do="give this user write access")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        return WriteError(f"{path}: no space: {num_bytes} bytes needed, {free} free", do="make room and resume")
    return WriteError(f"{path}: cannot be written: {error.strerror}")

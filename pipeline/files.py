"""Write files completely or not at all, and read untrusted ones. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import PermissionDenied, RunError, WriteError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
LOCK_NAME, LOCK_SECONDS = "job.lock", 2.0
# how long shared storage may take to show one node what another has written: NFS caches for that
# long that a file does not exist
SHARED_SECONDS = 60.0
SHARE_IT = "output_dir must be on storage that all nodes share"
# what an error calls the types of JSON
JSON_TYPES: dict[type, str] = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}
MAX_DIGITS = 20  # of a whole number in JSON: enough for 64 bits


def write_atomically(path: Path, content: bytes, *, is_name_durable: bool = True) -> None:
    """Write a file so that readers see all of it or none: write a temporary file, sync it, rename it.

    A temporary file that a killed process left is overwritten.

    Args:
        path: the file to write or replace.
        content: all of the file.
        is_name_durable: wait until the new name is on disk; without it the caller syncs the folder later.

    Raises:
        WriteError: the file cannot be written; nothing is left behind.
        PermissionDenied: this user may not write here.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            write_durably(file, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error, num_bytes=len(content)) from None
    if is_name_durable:
        sync_folder(path.parent)


def write_durably(file: BinaryIO, content: bytes) -> None:
    """Write ``content`` and wait until it is on disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def write_everything(descriptor: int, content: bytes | memoryview, start: int) -> None:
    """Write all of ``content`` at byte ``start`` of an open file; a single system call may write less than asked."""
    left = memoryview(content).cast("B")
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def require_writable(folder: Path, *, setting: str) -> None:
    """Check that this user can write to ``folder``, or could create it; nothing is created.

    Args:
        folder: the folder, which may not exist.
        setting: the key or option that names it, for the error.

    Raises:
        WriteError: it is not a folder, or its parent is not.
        PermissionDenied: this user may not write there.
    """
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
        if not existing.is_dir():
            what = "" if existing in (folder, folder.absolute()) else f" {existing}"
            raise WriteError(f"{folder}:{what} is not a folder", do=f"choose another {setting}")
        if not os.access(existing, os.W_OK | os.X_OK):
            reason = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
            raise cannot_write(folder, OSError(reason, os.strerror(reason)))
    except OSError as error:
        raise cannot_write(folder, error) from None


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_process_in(folder: Path, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold a lock on ``folder`` that only one process can have; False where the file system has no locks.

    However this process ends, the lock is released; the lock file stays.

    Args:
        folder: an existing folder.
        wait_seconds: for a process that holds the lock and may be ending.

    Raises:
        WriteError: another process holds the lock; the message names it and the time it started.
    """
    path = folder / LOCK_NAME
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b") as file:
        deadline, is_locked = time.monotonic() + wait_seconds, False
        while not is_locked:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WriteError(
                        f"{folder}: is in use by {_holder(file)}",
                        do="wait for it to end, or choose another output_dir",
                    ) from None
                time.sleep(0.1)  # a process that was killed may still be exiting
            except OSError as error:
                logger.warning(
                    "%s: this file system has no locks, so a second job would not be noticed: %s", path, error.strerror
                )
                break
        file.truncate()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        file.flush()
        yield is_locked


def at_work_in(folder: Path) -> str:
    """Describe the process that holds the lock on ``folder``; empty when there is none or it is unknown."""
    with contextlib.suppress(OSError, ValueError), open_regular(folder / LOCK_NAME) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file)
    return ""


def _holder(file: BinaryIO) -> str:
    return " ".join(file.read(200).decode(errors="replace").split()) or "another process"


def sha256_of(path: Path) -> str:
    """Digest (sha256, hexadecimal) of a file; raises the errors of :func:`open_regular`."""
    sha = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> BinaryIO:
    """Open an untrusted file for reading.

    Args:
        path: the file.
        follow: allow a symbolic link, for a path that the user has given.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is a link, a folder, a FIFO or a device, which could lead elsewhere, block or
            never end.
    """
    try:  # non-blocking: opening a FIFO would otherwise wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        reasons = {
            errno.ELOOP: "it is a symbolic link, expected the file itself",
            errno.ENXIO: "it is not a regular file",
        }
        if error.errno in reasons:
            raise ValueError(reasons[error.errno]) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_capped(path: str | os.PathLike[str], max_bytes: int, *, follow: bool = False) -> bytes:
    """Read an untrusted file of at most ``max_bytes``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger, or is not a regular file (see :func:`open_regular`).
    """
    with open_regular(path, follow=follow) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return content


def parse_json(text: bytes | str) -> Any:
    """Parse JSON, accepting only what every reader would read alike.

    Raises:
        ValueError: it is not JSON, or has a name twice in one object, a NaN or an infinity, a
            number of too many digits, or an unpaired surrogate.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
        if "\\ud" in text.lower():  # raises for an unpaired surrogate, which could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start})"
        ) from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it contains an unpaired surrogate ({error.object[error.start]!a})") from None
    except json.JSONDecodeError as error:
        what = error.msg.replace("Expecting", "Expected a").replace("enclosed in", "in").removesuffix(" at")
        what = what[0].lower() + what[1:]
        raise ValueError(f"{what} at line {error.lineno}, column {error.colno}") from None
    return value


def describe_json(value: Any) -> str:
    """Describe a JSON value for an error: its kind if it is a list or an object, else the value, shortened."""
    return JSON_TYPES[type(value)] if isinstance(value, list | dict) else json.dumps(value)[:40]


def why_malformed(error: Exception) -> str:
    """Say what is wrong with a JSON file, from the error that reading it or looking up its fields raised."""
    if isinstance(error, KeyError):
        return f"{str(error.args[0])[:40]!r} is missing"
    return str(error) if isinstance(error, ValueError) else "its structure is not as expected"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} appears twice in one object")
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:MAX_DIGITS]} is not a finite number")
    return value


def cannot_write(path: Path, error: OSError, *, num_bytes: int = 0) -> RunError:
    """Return the error for a failed write, naming the user without permission or the missing space."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(
            f"{path}: user {os.geteuid()} may not write here ({error.strerror})", do="give this user write access"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in path.parents if folder.exists())
        return WriteError(
            f"{path}: no space: {num_bytes} bytes needed, {shutil.disk_usage(existing).free} free",
            do="free some disk space and resume",
        )
    if error.errno == errno.EFBIG:  # what a limit of the process says, and some quotas
        return WriteError(
            f"{path}: no space: {num_bytes} bytes needed, and this user or process may not write a larger file",
            do="raise the limit (ulimit -f, or the quota) or free some disk space, and resume",
        )
    return WriteError(f"{path}: cannot be read or written: {error.strerror}", do="check the path")


def cannot_read(path: Path, error: OSError) -> RunError:
    """Return the error for a file that exists but cannot be read."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(
            f"{path}: user {os.geteuid()} may not read it ({error.strerror})", do="give this user read access"
        )
    return WriteError(f"{path}: cannot be read: {error.strerror}", do="check the storage, and start again")

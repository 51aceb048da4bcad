"""Files: whole or not there when written, distrusted when read. Standard library only."""

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
# how long storage may take to show one node what another has written: NFS remembers so long what
# was not there
SHARED_SECONDS = 60.0
SHARE_IT = "output_dir must be storage that all nodes share"
MAX_DIGITS = 20  # of a whole number in JSON: more than 64 bits hold


def write_atomically(path: Path, content: bytes, *, is_name_durable: bool = True) -> None:
    """Readers see the whole file or none: written beside its place, made durable, renamed.

    A left-over temporary file is reused.

    Without ``is_name_durable`` its name is not waited for: somebody syncs the folder later.

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
    if is_name_durable:
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


def require_writable(folder: Path) -> None:
    """Raise WriteError or PermissionDenied unless ``folder`` is one that this user can write to, or could make.

    Nothing is made.
    """
    try:
        existing = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
        if not existing.is_dir():
            raise WriteError(f"{folder}: {existing} is there and is not a folder", do="choose another place")
        if not os.access(existing, os.W_OK | os.X_OK):
            reason = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
            raise cannot_write(folder, OSError(reason, os.strerror(reason)))
    except OSError as error:
        raise cannot_write(folder, error) from None


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[None]:
    """Be the only process that is at work in ``folder``.

    However this process ends, the lock goes with it, the file stays.

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
                    raise WriteError(
                        f"{folder}: {_holder(file)} is at work here",
                        do="wait for its end, or choose another output_dir",
                    ) from None
                time.sleep(0.1)  # one that was killed may still be on its way out
            except OSError as error:
                logger.warning(
                    "%s: this file system has no locks, so nothing keeps a second job out: %s", path, error.strerror
                )
                break
        file.truncate()
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}".encode()
        )
        file.flush()
        yield


def at_work_in(folder: Path) -> str:
    """The process that is at work in ``folder``, and since when; empty when there is none, or it cannot be told."""
    with contextlib.suppress(OSError, ValueError), open_regular(folder / LOCK_NAME) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file)
    return ""


def _holder(file: BinaryIO) -> str:
    return " ".join(file.read(200).decode(errors="replace").split()) or "another process"


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file. Raises as :func:`open_regular`."""
    sha = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> BinaryIO:
    """Open for reading what nobody vouches for.

    ``follow``: ``path`` may be a symbolic link, as where a user names the file himself.

    Raises OSError, and ValueError with the reason for a link, a folder, a FIFO or a device: they
    lead elsewhere, wait, or never end.
    """
    try:  # non-blocking: opening a FIFO would otherwise wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        reasons = {errno.ELOOP: "a symbolic link, which is not followed", errno.ENXIO: "not a regular file"}
        if error.errno in reasons:
            raise ValueError(reasons[error.errno]) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return os.fdopen(descriptor, "rb")


def read_capped(path: str | os.PathLike[str], max_bytes: int, *, follow: bool = False) -> bytes:
    """The content of a file of at most ``max_bytes``.

    Raises as :func:`open_regular`, and ValueError for a larger one.
    """
    with open_regular(path, follow=follow) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes} bytes")
    return content


def parse_json(text: bytes | str) -> Any:
    """JSON that can only be read in one way: no name twice in an object, no NaN or infinity, no number beyond 64 bits, no half characters.

    Raises ValueError.
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
        if "\\ud" in text.lower():  # an escaped half of a character: no text that could be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice in an object")
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:MAX_DIGITS]} is not a finite number")
    return value


def cannot_write(path: Path, error: OSError, *, num_bytes: int = 0) -> RunError:
    """The error for a failed write: who may not, or how much space is missing."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(
            f"{path}: user {os.geteuid()} may not write here ({error.strerror})", do="give this user write access"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in path.parents if folder.exists())
        return WriteError(
            f"{path}: no space: {num_bytes} bytes needed, {shutil.disk_usage(existing).free} free",
            do="make room and resume",
        )
    return WriteError(f"{path}: cannot be read or written: {error.strerror}", do="check the path")


def cannot_read(path: Path, error: OSError) -> RunError:
    """The error for a file that is there and does not give what it holds."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(
            f"{path}: user {os.geteuid()} may not read it ({error.strerror})", do="give this user read access"
        )
    return WriteError(f"{path}: cannot be read: {error.strerror}", do="look at its storage, and start again")

"""Stage .beton files: copy them to a local disk of this node.

Training maps its files into memory and reads them in random order, which is too slow on network
storage. A copy is verified to the last byte, appears only when it is complete, and is made once,
however many processes ask for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.datasets.beton_format import damaged
from pipeline.datasets.sidecar import TABLES_DIFFER, BetonInfo, save_sidecar, tables_bounds, unlike_sidecar, verify
from pipeline.errors import DataError, PermissionDenied, WriteError
from pipeline.files import cannot_write, sync_folder, write_everything
from pipeline.terminal.progress import show_progress

logger = logging.getLogger(__name__)

NUM_READERS = 8  # network storage responds slowly, but to several requests at a time
WAIT_SECONDS = 0.2
LOG_INTERVAL_SECONDS = 30.0

OnProgress = Callable[[int, int], None]  # pages done, total number of pages


def stage(
    path: str | os.PathLike[str], folder: Path, *, level: int = 0, on_progress: OnProgress | None = None
) -> BetonInfo:
    """Copy the file at ``path`` and its sidecar into ``folder``, and return what the copy holds.

    An existing copy is verified to ``level`` (see `sidecar.verify`) and kept. An interrupted copy is
    continued: pages that are already correct are not copied again. If several processes of a node
    ask for the same copy, one makes it while the others wait.

    Raises:
        DataError: the source is damaged, or another data set has this name in ``folder``.
        WriteError: there is too little space.
        PermissionDenied: a file may not be read or written.
    """
    return _stage(verify(path, level=0), folder, level=level, on_progress=on_progress)


def stage_by_content(path: str | os.PathLike[str], folder: Path, *, level: int = 0) -> BetonInfo:
    """Stage a file into a subfolder of ``folder`` that is named after the digest of the file, and log the progress.

    Data sets with the same name, and new versions of a data set, can thus exist side by side.
    """
    source = verify(path, level=0)
    subfolder = folder / source.file_digest[:16]
    with show_progress(f"staging {source.path.name}", "pages") as report:
        return _stage(source, subfolder, level=level, on_progress=report)


def _stage(source: BetonInfo, folder: Path, *, level: int, on_progress: OnProgress | None) -> BetonInfo:
    path = source.path
    target = folder / path.name
    if target.exists() and target.samefile(path):
        return source if level == 0 else verify(path, level=level)
    with _locked(folder, path.name):
        if there := _existing_copy(target, source, level=level):
            return there
        partial = folder / f".{path.name}.staging"
        try:
            _copy(path, partial, source.sidecar, on_progress or (lambda *_: None))
            # the sidecar first: a file without a sidecar is rejected, a sidecar without a file is ignored
            save_sidecar(target, source.sidecar)
            partial.replace(target)
            sync_folder(folder)
        except (OSError, WriteError) as error:
            # free the space after an error; only a killed process leaves a partial copy, to be continued
            partial.unlink(missing_ok=True)
            if isinstance(error, WriteError):
                raise
            raise cannot_write(target, error, num_bytes=source.sidecar["size_bytes"]) from None
        return verify(target, level=max(1, level))


def _existing_copy(target: Path, source: BetonInfo, *, level: int) -> BetonInfo | None:
    """Return what the copy at ``target`` holds, if it exists and is intact; a damaged one is removed.

    Raises:
        DataError: ``target`` is another data set.
    """
    if not target.exists():
        return None
    try:
        there = verify(target, level=level)
    except DataError as error:
        logger.warning("copying again: %s", error.what)
        target.unlink()
        return None
    if there.file_digest != source.file_digest:
        raise DataError(
            f"{target}: already exists and is not a copy of {source.path}",
            do="choose another folder, or remove the file if nothing uses it",
        )
    return there


def _copy(path: Path, partial: Path, sidecar: dict[str, Any], on_progress: OnProgress) -> None:
    """Fill ``partial`` with the content of ``path``, comparing every page with its hash."""
    page_size, pages, size = sidecar["page_size"], sidecar["page_sha256"], sidecar["size_bytes"]
    first_page, end_of_pages = tables_bounds(sidecar)
    source = _open_source(path)
    copy = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(copy, min(os.fstat(copy).st_size, size))
        needed = size - os.fstat(copy).st_blocks * 512
        if needed > (free := shutil.disk_usage(partial.parent).free):
            raise WriteError(
                f"{partial.parent}: a copy of {path} needs {needed >> 20} MiB more, but {free >> 20} MiB are free",
                do="free some disk space",
            )

        def copy_page(number: int) -> None:
            start = first_page + number * page_size
            if sha256(os.pread(copy, page_size, start)).hexdigest() == pages[number]:
                return  # copied before an interruption
            content = _read(source, path, page_size, start)
            if sha256(content).hexdigest() != pages[number]:
                raise damaged(path, f"page {number} is damaged: its sha256 differs from the one in the sidecar")
            write_everything(copy, content, start)

        with ThreadPoolExecutor(NUM_READERS) as pool:  # reading, hashing and writing release the interpreter lock
            try:
                for number, _ in enumerate(pool.map(copy_page, range(len(pages))), 1):
                    on_progress(number, len(pages))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        tables = _read(source, path, first_page, 0), _read(source, path, size - end_of_pages, end_of_pages)
        if sha256(b"".join(tables)).hexdigest() != sidecar["tables_sha256"]:
            raise unlike_sidecar(path, TABLES_DIFFER)
        write_everything(copy, tables[0], 0)
        write_everything(copy, tables[1], end_of_pages)
        os.fsync(copy)
    finally:
        os.close(copy)
        os.close(source)


def _open_source(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_read(path, error) from error


def _read(source: int, path: Path, num_bytes: int, start: int) -> bytes:
    try:
        content = os.pread(source, num_bytes, start)
    except OSError as error:
        raise _cannot_read(path, error) from error
    if len(content) != num_bytes:
        raise damaged(
            path,
            f"ends at byte {start + len(content)}, but had at least {start + num_bytes} bytes when it was opened",
        )
    return content


def _cannot_read(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read: {error.strerror}",
        do="check the storage and start again; pages that were copied are kept",
    )


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock for making ``folder/name``, waiting while another process holds it.

    The system releases it when this process ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{name}.lock").open("w")
    except PermissionError:
        where = f"{folder}: may not be written by user id {os.geteuid()}"
        raise PermissionDenied(where, do="choose another folder, or make it writable") from None
    except OSError as error:
        raise cannot_write(folder / name, error) from None
    with closing(lock):
        reported = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - reported > LOG_INTERVAL_SECONDS:
                    reported = time.monotonic()
                    logger.info("%s is being staged by another process, waiting for it", folder / name)
                time.sleep(WAIT_SECONDS)
        yield

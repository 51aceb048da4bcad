"""Where the files of tar archives lie, so that they can be read without unpacking anything."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_prep.images import Source
from pipeline.errors import DataError

AGAIN = "get the archive again: compare its size and checksum with the published ones"
MAX_MEMBER_BYTES = 256 << 20  # of files that are read into memory


def list_members(path: Path) -> list[Source]:
    """The files of an uncompressed tar archive, hidden ones aside.

    Raises DataError, also for an archive that is cut short.
    """
    with _opened(path) as file:
        return list(_members(path, file, 0, path.stat().st_size))


def list_nested(path: Path, *, on_archive: Callable[[int, int], None] = lambda *_: None) -> dict[str, list[Source]]:
    """The files of every tar archive within an uncompressed tar archive, by the name of the inner archive without ``.tar``.

    ``on_archive`` is called with the number of inner archives looked through, and of all of them. Raises DataError.
    """
    found: dict[str, list[Source]] = {}
    with _opened(path) as file:
        archives = list_members(path)
        for index, archive in enumerate(archives, 1):
            name = PurePosixPath(archive.member)
            if name.suffix != ".tar" or name.stem in found:
                raise DataError(
                    f"{path}: {archive.member} is not one of a number of .tar archives with different names", do=AGAIN
                )
            assert archive.num_bytes is not None
            found[name.stem] = list(_members(path, file, archive.start, archive.start + archive.num_bytes))
            on_archive(index, len(archives))
    return found


def has_member(path: Path, name: str) -> bool:
    """Whether a tar archive, compressed or not, holds a file of which the name ends so. Raises DataError."""
    return _find_member(path, name) is not None


def read_member(path: Path, name: str) -> bytes:
    """One file, given by the end of its name, out of a tar archive that may be compressed. Raises DataError."""
    content = _find_member(path, name)
    if content is None:
        raise DataError(f"{path}: holds no {name}", do=AGAIN)
    return content


def _find_member(path: Path, name: str) -> bytes | None:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                    if member.size > MAX_MEMBER_BYTES:
                        raise DataError(
                            f"{path}: {member.name} has {member.size >> 20} MiB, more than {MAX_MEMBER_BYTES >> 20}",
                            do=AGAIN,
                        )
                    content = archive.extractfile(member)
                    return content.read() if content is not None else None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", do=AGAIN) from error
    return None


def _members(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[Source]:
    """The files between two offsets of an open archive."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                stop = member.offset_data + member.size
                if stop > end:
                    raise DataError(f"{path}: is cut short in {member.name}", do=AGAIN)
                if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: {member.name} is a link or a special file", do=AGAIN)
                yield Source(path, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive: {error}", do=AGAIN) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", do="check the path") from error

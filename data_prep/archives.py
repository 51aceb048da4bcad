"""Locate the files inside tar archives, so that they can be read without unpacking anything."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.datasets.image_file import ImageFile
from pipeline.errors import DataError

AGAIN = "download the archive again and compare its size and checksum with the published ones"
MAX_MEMBER_BYTES = 256 << 20  # largest file that is read into memory


def list_members(path: Path) -> list[ImageFile]:
    """List the files of an uncompressed tar archive, without hidden ones.

    Raises:
        DataError: the archive cannot be read or is truncated.
    """
    with _opened(path) as file:
        return list(_members(path, file, 0, path.stat().st_size))


def list_nested(path: Path, *, on_archive: Callable[[int, int], None] = lambda *_: None) -> dict[str, list[ImageFile]]:
    """List the files of every tar archive inside an uncompressed tar archive.

    Args:
        path: the outer archive.
        on_archive: called after each inner archive with the number listed so far and the total.

    Returns:
        The files by the name of their inner archive, without ``.tar``.

    Raises:
        DataError: an archive cannot be read or is truncated, or the outer one holds anything else.
    """
    found: dict[str, list[ImageFile]] = {}
    with _opened(path) as file:
        archives = list_members(path)
        for index, archive in enumerate(archives, 1):
            name = PurePosixPath(archive.member)
            if name.suffix != ".tar" or name.stem in found:
                raise DataError(f"{path}: expected .tar archives with different names, got {archive.member}", do=AGAIN)
            assert archive.num_bytes is not None
            found[name.stem] = list(_members(path, file, archive.start, archive.start + archive.num_bytes))
            on_archive(index, len(archives))
    return found


def has_member(path: Path, name: str) -> bool:
    """Return whether a tar archive, compressed or not, holds a file whose path ends with ``name``.

    Raises:
        DataError: the archive cannot be read.
    """
    return _find_member(path, name) is not None


def read_member(path: Path, name: str) -> bytes:
    """Read the file whose path ends with ``name`` from a tar archive, compressed or not.

    Raises:
        DataError: the archive cannot be read or has no such file.
    """
    content = _find_member(path, name)
    if content is None:
        raise DataError(f"{path}: does not contain {name}", do=AGAIN)
    return content


def _find_member(path: Path, name: str) -> bytes | None:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
                    if member.size > MAX_MEMBER_BYTES:
                        raise DataError(
                            f"{path}: {member.name} has {member.size >> 20} MiB, "
                            f"expected at most {MAX_MEMBER_BYTES >> 20}",
                            do=AGAIN,
                        )
                    content = archive.extractfile(member)
                    return content.read() if content is not None else None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", do=AGAIN) from error
    return None


def _members(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[ImageFile]:
    """Yield the files of the archive that lies between two offsets of an open file."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                stop = member.offset_data + member.size
                if stop > end:
                    raise DataError(f"{path}: is truncated in {member.name}", do=AGAIN)
                if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: {member.name} is a link or a special file", do=AGAIN)
                yield ImageFile(path, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive: {error}", do=AGAIN) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", do="check the path") from error

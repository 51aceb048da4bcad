"""The layout of a .beton file and the checks of its structure.

This is format version 2, as ffcv 1.0.2 writes it (``ffcv/types.py``, ``ffcv/writer.py``)::

    header | field descriptors | sample table | zeros up to a whole page | pages | allocation table

The sample table has one row per sample: place and size of its image, and its label. The allocation
table has one row per piece of page memory. All numbers are little-endian. Imports numpy only, so
that a data set is checked before any slow import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import DataError

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("allocation_table", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

FIELDS = (("image", 2), ("label", 1))  # name and type id of RGBImageField and IntField, in this order
JPEG, RAW = 0, 1
MIN_PAGE_SIZE = 1 << 21
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
REWRITE = "copy the file again, or rebuild it from the original data with python -m data_prep"


@dataclass(frozen=True)
class Tables:
    """The tables of one file."""

    path: Path
    page_size: int  # bytes
    num_pages: int
    samples: np.ndarray  # SAMPLE [num_samples]
    pointer: np.ndarray  # offset of each sample's image in bytes, int64 [num_samples]
    size: np.ndarray  # its size in bytes, int64 [num_samples]

    @property
    def pages_start(self) -> int:
        """Offset of the first page, in bytes."""
        return pages_start(len(self.samples), self.page_size)


def pages_start(num_samples: int, page_size: int) -> int:
    """Return the offset of the first page, in bytes: the size of the tables before it, rounded up to a page."""
    end = METADATA_START + num_samples * SAMPLE.itemsize
    return -(-end // page_size) * page_size


def describe_fields() -> bytes:
    """Return an empty header and the field descriptors, with which a file begins while its pages are written."""
    fields = np.zeros(len(FIELDS), FIELD)
    for row, (name, kind) in zip(fields, FIELDS, strict=True):
        row["type_id"], row["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    return bytes(HEADER.itemsize) + fields.tobytes()


def finished_header(*, page_size: int, num_samples: int, allocation_table: int) -> bytes:
    """Return the header and the field descriptors of a complete file."""
    header = np.zeros(1, HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), page_size
    header["num_samples"], header["allocation_table"] = num_samples, allocation_table
    return header.tobytes() + describe_fields()[HEADER.itemsize :]


def damaged(path: Path, why: str) -> DataError:
    """Return the error for a damaged file."""
    return DataError(f"{path}: {why}", do=REWRITE)


def read_tables(path: Path) -> Tables:
    """Read header and tables of ``path``, checking every number in the header against the size of the file.

    Raises:
        DataError: they are damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < METADATA_START:
            raise damaged(path, f"has {size} bytes, too few for an FFCV header")
        header = _read(file, HEADER, 1)[0]
        page_size, num_samples, table = (
            int(header["page_size"]),
            int(header["num_samples"]),
            int(header["allocation_table"]),
        )
        if header["version"] != VERSION:
            raise DataError(
                f"{path}: expected FFCV format version {VERSION}, got {header['version']}",
                do="write the data set again with python -m data_prep",
            )
        _check_fields(path, int(header["num_fields"]), file)
        if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
            raise damaged(path, f"page size: expected a power of two of at least {MIN_PAGE_SIZE}, got {page_size}")
        if num_samples == 0:
            raise damaged(path, "contains no samples")
        num_pages, rest = divmod(table - pages_start(num_samples, page_size), page_size)
        if num_pages < 1 or rest or table + num_samples * ALLOCATION.itemsize != size:
            raise damaged(
                path,
                f"{num_samples} samples and an allocation table at byte {table} do not fit in a file of {size} bytes",
            )
        samples = _read(file, SAMPLE, num_samples)
        file.seek(table)
        allocations = _read(file, ALLOCATION, num_samples)
    pointer, lengths = _by_sample(path, allocations, table)
    return Tables(path, page_size, num_pages, samples, pointer, lengths)


def check_structure(tables: Tables, num_classes: int) -> None:
    """Check every row: overlaps, modes, dimensions, start and end of JPEGs, labels in ``[0, num_classes)``.

    Raises:
        DataError: a row is damaged.
    """
    image, label, pointer, size = tables.samples["image"], tables.samples["label"], tables.pointer, tables.size
    _refuse_any(
        tables.path,
        image["pointer"] != pointer.astype(np.uint64),
        lambda i: f"points to byte {image['pointer'][i]}, but the allocation table says {pointer[i]}",
    )
    _refuse_any(tables.path, size == 0, "has a size of 0 bytes")
    in_page = pointer - tables.pages_start
    leaves_page = in_page // tables.page_size != (in_page + size - 1) // tables.page_size
    _refuse_any(tables.path, leaves_page | (in_page < 0), "does not lie inside one page")
    order = np.argsort(pointer, kind="stable")
    overlaps = np.zeros(len(order), dtype=bool)
    overlaps[order[1:]] = (pointer + size)[order[:-1]] > pointer[order[1:]]
    _refuse_any(tables.path, overlaps, "overlaps another sample")
    _refuse_any(
        tables.path,
        (image["mode"] != JPEG) & (image["mode"] != RAW),
        lambda i: f"has image mode {image['mode'][i]}, expected {JPEG} (JPEG) or {RAW} (raw)",
    )
    _refuse_any(tables.path, (image["width"] == 0) | (image["height"] == 0), "has an image without pixels")
    num_pixels = image["width"].astype(np.int64) * image["height"]
    is_jpeg = image["mode"] == JPEG
    _refuse_any(
        tables.path,
        ~is_jpeg & (size != 3 * num_pixels),
        lambda i: f"has a raw image of {size[i]} bytes, expected {3 * num_pixels[i]}",
    )
    _check_jpeg_markers(tables, np.flatnonzero(is_jpeg))
    wrong = np.flatnonzero((label < 0) | (label >= num_classes))
    if wrong.size:
        where = f"sample {wrong[0]} has label {label[wrong[0]]}"
        raise damaged(
            tables.path,
            f"{where}, expected 0–{num_classes - 1} for {num_classes} classes ({_such_samples(wrong.size)})",
        )


def _read(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)


def _check_fields(path: Path, num_fields: int, file: BinaryIO) -> None:
    fields = _read(file, FIELD, len(FIELDS))
    found = [(row["name"].tobytes().rstrip(b"\0").decode("ascii", "replace"), int(row["type_id"])) for row in fields]
    if num_fields == len(FIELDS) and found == list(FIELDS):
        return
    shown = _in_words(found[:num_fields])
    if num_fields > len(FIELDS):
        listed = ", ".join(f"{name} (type {kind})" for name, kind in found)
        shown = f"{num_fields} fields: {listed} and {num_fields - len(FIELDS)} more"
    raise DataError(
        f"{path}: expected the fields {_in_words(FIELDS)}, got {shown or 'none'}",
        do="write the data set with python -m data_prep",
    )


def _in_words(fields: Sequence[tuple[str, int]]) -> str:
    return " and ".join(f"{name} (type {kind})" for name, kind in fields)


def _by_sample(path: Path, allocations: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort pointers and sizes, which the table holds in the order of writing, by sample."""
    num_samples = len(allocations)
    ids = allocations["sample"]
    if ids.max() >= num_samples or np.bincount(ids.astype(np.int64), minlength=num_samples).max() > 1:
        raise damaged(path, f"its allocation table does not list every sample 0–{num_samples - 1} exactly once")
    order = np.empty(num_samples, dtype=np.int64)
    order[ids.astype(np.int64)] = np.arange(num_samples)
    pointer, size = allocations["pointer"][order], allocations["size"][order]
    _refuse_any(path, (pointer > end) | (size > end) | (pointer + size > end), "lies outside the file's pages")
    return pointer.astype(np.int64), size.astype(np.int64)


def _check_jpeg_markers(tables: Tables, jpegs: np.ndarray) -> None:
    content = np.memmap(tables.path, dtype=np.uint8, mode="r")
    start, end = tables.pointer[jpegs], (tables.pointer + tables.size)[jpegs]
    is_whole = tables.size[jpegs] >= 4
    for where, marker in ((start, 0xFF), (start + 1, 0xD8), (end - 2, 0xFF), (end - 1, 0xD9)):
        is_whole &= content[where] == marker
    wrong = np.zeros(len(tables.samples), dtype=bool)
    wrong[jpegs] = ~is_whole
    _refuse_any(tables.path, wrong, "is not a complete JPEG")


def _refuse_any(path: Path, wrong: np.ndarray, what: str | Callable[[int], str]) -> None:
    if wrong.any():
        first = int(np.argmax(wrong))
        reason = what if isinstance(what, str) else what(first)
        raise damaged(path, f"sample {first} {reason} ({_such_samples(int(wrong.sum()))})")


def _such_samples(count: int) -> str:
    return "1 such sample" if count == 1 else f"{count} such samples"

"""Reading a ticket file that nobody vouches for: everything is checked from the header, before the body is read."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from pipeline.errors import DataError, PermissionDenied
from pipeline.tickets.packing import DENSE, MASK, VALUES, num_packed_bytes

FORMAT_VERSION = 1
Layout = dict[str, dict[str, Any]]  # name -> {"kind": "sparse" | "parameter" | "buffer", "shape": [...]}, in state_dict order
Source = bytes | str | os.PathLike[str]

MAX_HEADER_BYTES = 16 * 2**20  # a ResNet-50's header is 60 kB
MAX_DENSE_BYTES = 16 * 2**30  # the largest network that is unpacked: a small file can describe a huge one
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_DTYPES = _FLOATS | {"U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}


def read_checked(source: Source) -> tuple[bytes, dict[str, Any], Layout]:
    """(whole file, ticket header, layout). The body is read only when the header describes a ticket of acceptable size.

    Raises ValueError, OverflowError or RecursionError with the reason when the content is not acceptable, DataError or
    PermissionDenied when there is nothing to read.
    """
    if isinstance(source, bytes):
        return source, *_parse_head(source[: 8 + MAX_HEADER_BYTES], len(source))
    try:
        # Non-blocking: opening a FIFO would otherwise wait for a writer.
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return _read_open(file)
    except OSError as error:
        raise _cannot_read(Path(source), error) from None


def as_object(value: Any, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object, else ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what[:80]}: not a JSON object")
    return value


def _read_open(file: BinaryIO) -> tuple[bytes, dict[str, Any], Layout]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
    parsed = _parse_head(head, status.st_size)
    return head + file.read(status.st_size - len(head)), *parsed


def _parse_head(head: bytes, size_bytes: int) -> tuple[dict[str, Any], Layout]:
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > MAX_HEADER_BYTES or len(head) < 8 + length:
        raise ValueError("truncated, or not a safetensors file")
    entries = as_object(_parse_json(head[8 : 8 + length]), "safetensors header")
    metadata = as_object(entries.pop("__metadata__", {}), "__metadata__")
    described = 8 + length + sum(_num_bytes(name, as_object(entry, name)) for name, entry in entries.items())
    if described != size_bytes:
        raise ValueError(f"{size_bytes} bytes, but the header describes {described}")
    if not isinstance(metadata.get("ticket"), str):
        raise ValueError("a safetensors file, but not a ticket: its metadata has no 'ticket'")
    header = as_object(_parse_json(metadata["ticket"]), "ticket header")
    if header.get("format") != FORMAT_VERSION:
        raise ValueError(f"ticket format {str(header.get('format'))[:20]}, this version reads {FORMAT_VERSION}")
    return header, _checked_layout(header.get("tensors"), entries)


def _checked_layout(layout: Any, entries: Mapping[str, Any]) -> Layout:
    """The layout, once every tensor it names is found among the entries with a fitting dtype and size, and nothing else is there."""
    unexpected = set(entries)
    dense_bytes = 0
    for name, item in as_object(layout, "tensors").items():
        kind, shape = as_object(item, name).get("kind"), item.get("shape")
        if not TENSOR_NAME.fullmatch(name) or kind not in ("sparse", "parameter", "buffer") or not _is_sizes(shape):
            raise ValueError(f"{name[:80]!r}: name, kind or shape is not valid")
        keys = (MASK + name, VALUES + name) if kind == "sparse" else (DENSE + name,)
        if not set(keys) <= entries.keys():
            raise ValueError(f"{name}: missing")
        body = entries[keys[-1]]
        if not (_fits_sparse(entries[keys[0]], body, shape) if kind == "sparse" else body["shape"] == shape):
            raise ValueError(f"{name}: what is stored does not fit the shape {shape}")
        dense_bytes += math.prod(shape) * _DTYPES[body["dtype"]]
        unexpected -= set(keys)
    if unexpected:
        raise ValueError(f"unexpected tensors: {', '.join(sorted(unexpected)[:3])[:200]}")
    if dense_bytes > MAX_DENSE_BYTES:
        raise ValueError(f"unpacks to {dense_bytes} bytes, more than {MAX_DENSE_BYTES}")
    return dict(layout)


def _fits_sparse(bits: dict[str, Any], values: dict[str, Any], shape: list[int]) -> bool:
    num_weights = math.prod(shape)
    is_mask = bool(shape) and num_weights > 0 and bits["dtype"] == "U8" and bits["shape"] == [num_packed_bytes(num_weights)]
    return is_mask and values["dtype"] in _FLOATS and len(values["shape"]) == 1 and values["shape"][0] <= num_weights


def _num_bytes(name: str, entry: dict[str, Any]) -> int:
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r}: dtype, shape or offsets are not valid")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
        raise ValueError(f"{name[:80]!r}: {offsets[1] - offsets[0]} bytes for {dtype} {shape}")
    return offsets[1] - offsets[0]


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _parse_json(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} in the header")


def _cannot_read(path: Path, error: OSError) -> Exception:
    if error.errno == errno.ELOOP:
        return ValueError("a symbolic link, which is not followed")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{path}: user {os.geteuid()} may not read it", do="give this user the right to read")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DataError(f"{path}: no such file")
    return ValueError(f"cannot be read: {error.strerror}")

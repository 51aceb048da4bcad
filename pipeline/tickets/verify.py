"""Read an untrusted ticket file: check the header before reading the body, then check every byte of the body.

Imports numpy only, so that a damaged ticket is reported before torch is imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, IntegrityError, PermissionDenied
from pipeline.files import describe_json, open_regular, parse_json
from pipeline.tickets.network import Network, network_of
from pipeline.tickets.provenance import Provenance, provenance_of

FORMAT_VERSION, FORMAT_MINOR = 2, 1  # that are written; minor 0 if nothing of minor 1 is recorded
FIRST_VERSION = 1  # the oldest that is read
MASK, VALUES, DENSE = "mask/", "values/", "dense/"
# name -> {"kind": "sparse" | "parameter" | "buffer", "shape": [...]}, in state_dict order
TensorLayout = dict[str, dict[str, Any]]
TicketSource = bytes | str | os.PathLike[str]  # content of a ticket file, or its path

MAX_HEADER_BYTES = 16 * 2**20  # a ResNet-50's header is 60 kB
MAX_DENSE_BYTES = 16 * 2**30  # largest network that is unpacked; a small file can describe a huge one
_KINDS = ("sparse", "parameter", "buffer")
_SIZES = "at most 8 whole numbers from 0 to 2^48 - 1"
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_DTYPES = _FLOATS | {"U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8", "BOOL": "bool"}
_TORCH_NAMES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
_UNSIGNED = {2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True)
class Format:
    """How a ticket file is written, and what this version of the project does not know in it."""

    version: int = FORMAT_VERSION
    minor: int = 0  # adds fields at the end of the header's objects, which an older reader keeps
    unknown: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by object: header, provenance, network


WRITTEN = Format()


@dataclass(frozen=True, eq=False)
class VerifiedTicket:
    """A ticket file of which every byte has been checked; its tensors are still bytes."""

    provenance: Provenance
    network: Network | None
    format: Format
    content_digest: str
    layout: TensorLayout
    content: bytes


def read_verified(source: TicketSource) -> VerifiedTicket:
    """Read a ticket from a file, or from bytes; the body is read only if the header is acceptable.

    Raises:
        IntegrityError: the ticket is damaged.
        DataError: the file does not exist.
        PermissionDenied: the file may not be read.
    """
    try:
        content = source if isinstance(source, bytes) else _read_file(Path(source))
        header, entries, start = _parse_head(content[: 8 + MAX_HEADER_BYTES], len(content))
        layout = _checked_layout(header.get("tensors"), entries)
        provenance, network, form = _described(header, layout)
        tensors = {name: _Stored(entry, memoryview(content)[start:]) for name, entry in entries.items()}
        stated, digest = header.pop("content_sha256", None), _content_digest(header, tensors)
        if stated != digest:
            raise ValueError(f"the sha256 of its content is {digest}, but the header says {str(stated)[:64]}")
        for name, item in layout.items():
            if item["kind"] == "sparse":
                _check_sparse(name, tensors[MASK + name], tensors[VALUES + name], math.prod(item["shape"]))
        for name, tensor in tensors.items():
            if not tensor.is_finite():
                raise ValueError(f"{name} has a value that is not finite")
    except (ValueError, OverflowError) as error:
        raise not_intact(source, error) from None
    return VerifiedTicket(provenance, network, form, digest, layout, content)


def digest_without_run(ticket: VerifiedTicket) -> str:
    """Return the content digest that the ticket had before it was named after its run.

    Equal runs have equal tickets but for this name.
    """
    header, entries, start = _parse_head(ticket.content[: 8 + MAX_HEADER_BYTES], len(ticket.content))
    del header["content_sha256"]
    header["provenance"]["parent_run"] = ""
    body = memoryview(ticket.content)[start:]
    return _content_digest(header, {name: _Stored(entry, body) for name, entry in entries.items()})


def not_intact(source: TicketSource, reason: object) -> IntegrityError:
    """Return the error for a file that is damaged or is not a ticket."""
    where = "<bytes>" if isinstance(source, bytes) else str(source)
    what = f"{where}: is not an intact ticket: {reason}"
    if isinstance(reason, _UnknownFormat):
        return OtherVersionError(what, do="use the version of ticketworks that wrote it, or leave it out")
    return IntegrityError(what, do="restore it from a copy, or leave it out")


class OtherVersionError(IntegrityError):
    """A ticket has a format that only another version of ticketworks reads."""


class _UnknownFormat(ValueError):
    """The header states a format that this version does not read."""


def _described(header: Mapping[str, Any], layout: TensorLayout) -> tuple[Provenance, Network | None, Format]:
    """Return what the header says beside the tensors. Version 1 has no ``network``, and its preprocessing may lack."""
    version, minor = header["format"], header.get("minor")
    stated = _as_object(header.get("provenance"), "provenance")
    if version == FIRST_VERSION:
        return provenance_of({"preprocessing": {}} | stated)[0], None, Format(version)
    if type(minor) is not int or not 0 <= minor < 2**31:
        raise ValueError(f"minor format version: expected a whole number >= 0, got {describe_json(minor)}")
    keep = minor > FORMAT_MINOR
    known = ("format", "minor", "provenance", "network", "tensors", "content_sha256")
    unknown = {"header": {name: value for name, value in header.items() if name not in known}}
    if unknown["header"] and not keep:
        raise ValueError(f"unknown field {sorted(unknown['header'])[0][:80]!r}")
    provenance, unknown["provenance"] = provenance_of(stated, minor=minor, keep=keep)
    network = None
    if "network" in header:
        sizes = {kind: {} for kind in _KINDS}  # type: dict[str, dict[str, int]]
        for name, item in layout.items():
            sizes[item["kind"]][name] = math.prod(item["shape"])
        network, unknown["network"] = network_of(
            _as_object(header["network"], "network"),
            num_classes=provenance.num_classes,
            dense_parameters=sizes["parameter"],
            num_weights=sum(sizes["sparse"].values()),
            keep=keep,
        )
    return provenance, network, Format(version, minor, unknown)


class _Stored:
    """One tensor as stored in the file."""

    def __init__(self, entry: dict[str, Any], body: memoryview) -> None:
        self.dtype, self.shape = entry["dtype"], entry["shape"]
        self.content = body[slice(*entry["data_offsets"])]

    def is_finite(self) -> bool:
        """Return whether all numbers are finite: of a number that is not, all bits of the exponent are set."""
        exponent = _EXPONENTS.get(self.dtype)
        if exponent is None:
            return True
        bits = np.frombuffer(self.content, _UNSIGNED[_DTYPES[self.dtype]])
        return not bool(((bits & exponent) == exponent).any())


def _content_digest(header: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> str:
    """Digest (sha256) of header and tensors; see ``format._content_digest``."""
    sha = hashlib.sha256(json.dumps(header, separators=(",", ":"), allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {_TORCH_NAMES[tensor.dtype]} {tensor.shape}\n".encode())
        sha.update(tensor.content)
    return sha.hexdigest()


def count_bits(octets: NDArray[np.uint8]) -> int:
    """Return how many bits of all bytes are 1."""
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(octets).sum())
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # numpy 1
    return int(np.bincount(octets.reshape(-1), minlength=256) @ ones)


def _check_sparse(name: str, bits: _Stored, values: _Stored, num_weights: int) -> None:
    """Check that there is one value for each set bit, and no set bit beyond the last weight."""
    if num_weights % 8 and bits.content[-1] >> num_weights % 8:
        raise ValueError(f"{name}: the mask has bits set beyond its last weight")
    num_active = count_bits(np.frombuffer(bits.content, np.uint8))
    if values.shape != [num_active]:
        raise ValueError(f"{name}: the mask has {num_active} active weights, but {values.shape[0]} values are stored")


def _read_file(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
            header, entries, _ = _parse_head(head, size)
            _checked_layout(header.get("tensors"), entries)
            return head + file.read(size - len(head))
    except OSError as error:
        raise _cannot_read(path, error) from None


def _parse_head(head: bytes, size_bytes: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the ticket header, the entry of every tensor, and the offset of the first tensor's bytes."""
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or len(head) < 8 + length:
        raise ValueError("it is truncated or is not a safetensors file")
    entries = _parse_object(head[8 : 8 + length], "safetensors header")
    metadata = _as_object(entries.pop("__metadata__", {}), "__metadata__")
    described = 8 + length + sum(_num_bytes(name, _as_object(entry, name)) for name, entry in entries.items())
    if described != size_bytes:
        raise ValueError(f"it has {size_bytes} bytes, but the header describes {described}")
    _require_no_overlap(entries)
    if not isinstance(metadata.get("ticket"), str):
        what = "a dense export of a ticket" if "exported_from" in metadata else "a safetensors file but not a ticket"
        raise ValueError(f"it is {what}: its metadata has no 'ticket'")
    header = _parse_object(metadata["ticket"], "ticket header")
    if type(header.get("format")) is not int or not FIRST_VERSION <= header["format"] <= FORMAT_VERSION:
        raise _UnknownFormat(
            f"expected ticket format {FIRST_VERSION} or {FORMAT_VERSION}, "
            f"got {describe_json(header.get('format'))}: it was written by another version of ticketworks"
        )
    return header, entries, 8 + length


def _parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its {what} is not valid JSON: {error}") from None
    return _as_object(value, what)


def _require_no_overlap(entries: Mapping[str, Any]) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            start = entry["data_offsets"][0]
            raise ValueError(
                f"{name[:80]!r}: starts at byte {start}, expected {end} "
                "(tensors must follow one another without gaps or overlaps)"
            )
        end = entry["data_offsets"][1]


def _as_object(value: Any, what: str) -> dict[str, Any]:
    """Return ``value`` if it is a JSON object, else raise ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{what[:80]}: expected a JSON object, got {describe_json(value)}")
    return value


def _checked_layout(layout: Any, entries: Mapping[str, Any]) -> TensorLayout:
    """Return the layout after checking that its tensors, and no others, are stored with fitting dtypes and sizes."""
    unexpected = set(entries)
    dense_bytes = 0
    for name, item in _as_object(layout, "tensors").items():
        kind, shape = _as_object(item, name).get("kind"), item.get("shape")
        if not TENSOR_NAME.fullmatch(name):
            raise ValueError(f"tensors: {name[:80]!r} is not a valid tensor name")
        if kind not in _KINDS:
            raise ValueError(f"{name}: kind: expected {', '.join(_KINDS[:-1])} or {_KINDS[-1]}, got {_shown(kind)}")
        if not _is_sizes(shape):
            raise ValueError(f"{name}: shape: expected {_SIZES}, got {_shown(shape)}")
        keys = (MASK + name, VALUES + name) if kind == "sparse" else (DENSE + name,)
        if not set(keys) <= entries.keys():
            raise ValueError(f"{name}: is missing")
        body = entries[keys[-1]]
        if not (_fits_sparse(entries[keys[0]], body, shape) if kind == "sparse" else body["shape"] == shape):
            raise ValueError(f"{name}: the stored tensor does not fit the shape {shape}")
        dense_bytes += math.prod(shape) * _DTYPES[body["dtype"]]
        unexpected -= set(keys)
    if unexpected:
        raise ValueError(f"unexpected tensors: {', '.join(sorted(unexpected)[:3])[:200]}")
    if dense_bytes > MAX_DENSE_BYTES:
        raise ValueError(f"it unpacks to {dense_bytes} bytes, expected at most {MAX_DENSE_BYTES}")
    return dict(layout)


def _fits_sparse(bits: dict[str, Any], values: dict[str, Any], shape: list[int]) -> bool:
    num_weights = math.prod(shape)
    is_mask = (
        bool(shape) and num_weights > 0 and bits["dtype"] == "U8" and bits["shape"] == [num_packed_bytes(num_weights)]
    )
    return is_mask and values["dtype"] in _FLOATS and len(values["shape"]) == 1 and values["shape"][0] <= num_weights


def num_packed_bytes(num_weights: int) -> int:
    """Return how many bytes the bits of a mask take."""
    return (num_weights + 7) // 8


def _num_bytes(name: str, entry: dict[str, Any]) -> int:
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name[:80]!r}: dtype: expected one of {', '.join(_DTYPES)}, got {_shown(dtype)}")
    if not _is_sizes(shape):
        raise ValueError(f"{name[:80]!r}: shape: expected {_SIZES}, got {_shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r}: data_offsets: expected the first byte and the end, got {_shown(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
        raise ValueError(f"{name[:80]!r}: has {offsets[1] - offsets[0]} bytes for {dtype} {shape}")
    return offsets[1] - offsets[0]


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**48 for item in value)
    )


def _cannot_read(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDenied(f"{path}: user {os.geteuid()} may not read it", do="give this user read access")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DataError(f"{path}: does not exist", do="check the path")
    return ValueError(f"it cannot be read: {error.strerror}")

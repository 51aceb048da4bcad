"""Read and write ticket files: one safetensors file with packed masks, active values, dense tensors and provenance.

See docs/ticket-format.md. Imports torch, numpy and safetensors only, so that tickets can be read
wherever torch is installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import NumericsError
from pipeline.sparse.masks import pack_mask
from pipeline.tickets.network import Network
from pipeline.tickets.packing import pack_sparse, pack_values, unpack_sparse, unpack_stored_mask, unpack_values
from pipeline.tickets.provenance import ORIGIN_MINOR, Provenance
from pipeline.tickets.verify import (
    FIRST_VERSION,
    TENSOR_NAME,
    WRITTEN,
    Format,
    TensorLayout,
    TicketSource,
    not_intact,
    read_verified,
)

__all__ = [
    "PREPROCESSING",
    "PackedTicket",
    "Provenance",
    "Ticket",
    "decode",
    "encode",
    "read_packed",
    "ticket_of",
    "unpack",
]
__all__ += ["pack_mask", "pack_sparse", "pack_values", "unpack_sparse", "unpack_stored_mask", "unpack_values"]

# Keys of the configuration's ``data`` that say how images are prepared for the network. A ticket
# records them, so that it can be evaluated without the configuration. A key at its neutral value is
# left out, as in files from before there was the key.
PREPROCESSING = (
    "augmentation",
    "min_scale",
    "flip",
    "train_resolution",
    "eval_resolution",
    "eval_ratio",
    "mean",
    "std",
    "eval_resize",
)


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse network and its provenance."""

    provenance: Provenance
    state: dict[str, Tensor]  # a complete state_dict on the CPU, 0 outside the masks
    masks: dict[str, Tensor]  # boolean, True = active
    buffers: frozenset[str] = frozenset()  # names in state that are not parameters (BatchNorm statistics)
    network: Network | None = None  # None: not recorded, as in version 1 of the format
    format: Format = WRITTEN  # of the file that it was read from, or will be written as

    @cached_property
    def num_active(self) -> int:
        """Number of active sparse weights."""
        return sum(int(mask.count_nonzero()) for mask in self.masks.values())

    @property
    def density(self) -> float:
        """Share of sparse weights that are active, counted in the masks; 1 for a network without masks."""
        return self.num_active / sum(mask.numel() for mask in self.masks.values()) if self.masks else 1.0

    @property
    def num_parameters(self) -> int:
        """Number of active weights and dense parameters, without buffers."""
        dense = (
            tensor.numel() for name, tensor in self.state.items() if name not in self.masks and name not in self.buffers
        )
        return self.num_active + sum(dense)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(tensor.dtype for name, tensor in self.state.items() if name not in self.buffers)

    @cached_property
    def content_digest(self) -> str:
        """sha256 over provenance, masks, values and dense tensors."""
        return _content_digest(_header(self), pack_sparse(self.state, self.masks))


def ticket_of(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    provenance: Provenance,
    network: Network | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Ticket:
    """Copy the state of a model into a ticket.

    Args:
        model: the network to copy.
        masks: boolean, by parameter name, True = active.
        provenance: where the ticket comes from.
        network: what its tensors do not say about the network.
        buffers: values that replace the model's buffers of these names (statistics averaged over ranks).
        dtype: what to round the parameters to, to nearest and ties to even; None keeps them as
            they are. Buffers are never rounded.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict() | dict(buffers or {})
    assert state.keys() == model.state_dict().keys(), "the model does not have some of the buffers"
    rounded = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in state.items()}
    return Ticket(
        provenance,
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in rounded.items()},
        {name: mask.detach().cpu().clone(memory_format=torch.contiguous_format) for name, mask in masks.items()},
        frozenset(state.keys() - parameters),
        network,
    )


def encode(ticket: Ticket) -> bytes:
    """Return the bytes of a ticket file; equal tickets give equal bytes.

    Raises:
        NumericsError: a value is NaN or infinite.
        IntegrityError: a weight outside its mask is not zero.
    """
    tensors = pack_sparse(ticket.state, ticket.masks)
    _check_finite(tensors)
    for name in ticket.state:
        assert TENSOR_NAME.fullmatch(name), f"not a tensor name: {name!r}"
    header = _header(ticket)
    header["content_sha256"] = _content_digest(header, tensors)
    return bytes(safetensors.torch.save(tensors, metadata={"ticket": json.dumps(header, allow_nan=False)}))


@dataclass(frozen=True, eq=False)
class PackedTicket:
    """A ticket file that has been read and verified but not unpacked yet."""

    provenance: Provenance
    network: Network | None
    format: Format
    content_digest: str
    layout: TensorLayout
    tensors: dict[str, Tensor]


def decode(source: TicketSource) -> Ticket:
    """Read a ticket from a file, or from bytes.

    Raises:
        IntegrityError: the ticket is damaged.
        DataError: the file does not exist.
        PermissionDenied: the file may not be read.
    """
    return unpack(read_packed(source))


def unpack(packed: PackedTicket) -> Ticket:
    """Unpack a ticket that has been read."""
    state, masks = unpack_sparse(packed.tensors, _sparse_shapes(packed.layout))
    buffers = frozenset(name for name, item in packed.layout.items() if item["kind"] == "buffer")
    ordered = {name: state[name] for name in packed.layout}
    return Ticket(packed.provenance, ordered, masks, buffers, packed.network, packed.format)


def read_packed(source: TicketSource) -> PackedTicket:
    """Read and verify a ticket without unpacking it; raises the errors of `decode`."""
    verified = read_verified(source)
    try:
        tensors = safetensors.torch.load(verified.content)
    except SafetensorError as error:  # the library has the last word on what a safetensors file is
        raise not_intact(source, error) from None
    of = verified
    return PackedTicket(of.provenance, of.network, of.format, of.content_digest, of.layout, tensors)


def _header(ticket: Ticket) -> dict[str, Any]:
    def kind(name: str) -> str:
        return "sparse" if name in ticket.masks else "buffer" if name in ticket.buffers else "parameter"

    layout = {name: {"kind": kind(name), "shape": list(tensor.shape)} for name, tensor in ticket.state.items()}
    provenance, of = asdict(ticket.provenance), ticket.format
    minor = of.minor
    if not ticket.provenance.origin:
        del provenance["origin"]
    else:
        minor = max(minor, ORIGIN_MINOR)
    if of.version == FIRST_VERSION:  # such files must keep their hash
        if not ticket.provenance.preprocessing:
            del provenance["preprocessing"]
        return {"format": of.version, "provenance": provenance, "tensors": layout}
    known: dict[str, dict[str, Any]] = {"provenance": provenance}
    if ticket.network is not None:
        known["network"] = asdict(ticket.network)
    described = {name: fields | of.unknown.get(name, {}) for name, fields in known.items()}
    return {"format": of.version, "minor": minor, **described, "tensors": layout, **of.unknown.get("header", {})}


def _sparse_shapes(layout: TensorLayout) -> dict[str, list[int]]:
    return {name: item["shape"] for name, item in layout.items() if item["kind"] == "sparse"}


def _content_digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest (sha256) of header and tensors.

    Covers the header without the digest itself, then the name, dtype, shape and bytes of every
    tensor in order of name.
    """
    sha = hashlib.sha256(json.dumps(header, separators=(",", ":"), allow_nan=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{name} of the ticket has a value that is not finite")

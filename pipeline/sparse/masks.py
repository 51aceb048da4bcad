"""Masks as bits: packing and digests. A mask is a bool tensor, True = active, keyed by parameter name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Masks = Mapping[str, Tensor]  # bool, True = active, by parameter name


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape into bits in logical order, little-endian per byte: uint8 [ceil(n / 8)] on CPU."""
    return pack_masks({"": mask})[""]


def pack_masks(masks: Masks) -> dict[str, Tensor]:
    """Every mask as :func:`pack_mask` gives it.

    On other devices than the CPU the bits are packed there and come over in one transfer.
    """
    flat = {name: mask.reshape(-1) for name, mask in masks.items()}
    if all(mask.device.type == "cpu" for mask in flat.values()):
        return {name: torch.from_numpy(np.packbits(mask.numpy(), bitorder="little")) for name, mask in flat.items()}
    first = next(iter(flat.values()))
    padding = first.new_zeros(7)  # every mask starts with a byte of its own
    parts = [part for mask in flat.values() for part in (mask, padding[: -len(mask) % 8])]
    shifts = torch.arange(8, dtype=torch.uint8, device=first.device)
    packed = (torch.cat(parts).view(torch.uint8).view(-1, 8) << shifts).sum(1, dtype=torch.uint8).cpu()
    return dict(zip(masks, torch.split(packed, [(len(mask) + 7) // 8 for mask in flat.values()]), strict=True))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`. bool, of ``shape``."""
    num = math.prod(shape)
    assert bits.numel() == (num + 7) // 8, f"{bits.numel()} bytes cannot hold a mask of shape {tuple(shape)}"
    flat = np.unpackbits(bits.numpy(), count=num, bitorder="little").astype(np.bool_)
    return torch.from_numpy(flat).view(*shape)


def mask_digest(masks: Masks, packed: Mapping[str, Tensor] | None = None) -> str:
    """sha256 (hex) of names, shapes and bits of all masks, in their order. ``packed`` saves packing them again."""
    packed = pack_masks(masks) if packed is None else packed
    sha = hashlib.sha256()
    for name, mask in masks.items():
        sha.update(f"{name}{tuple(mask.shape)}".encode())
        sha.update(packed[name].numpy().tobytes())
    return sha.hexdigest()


def layer_digests(packed: Mapping[str, Tensor]) -> dict[str, int]:
    """A 63-bit fingerprint of each layer's packed mask, for the comparison between ranks."""
    return {
        name: int.from_bytes(hashlib.sha256(bits.numpy().tobytes()).digest()[:8], "big") >> 1
        for name, bits in packed.items()
    }

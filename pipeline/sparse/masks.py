"""Masks as bits: packing, digests, and the binding of masks to weights. A mask is a bool tensor, True = active, keyed by parameter name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Masks = Mapping[str, Tensor]


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of any shape as bits in logical, contiguous order (little-endian in each byte). uint8 [ceil(n / 8)], on the CPU."""
    flat = mask.reshape(-1).cpu().numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_mask`. bool, of ``shape``."""
    num = math.prod(shape)
    assert bits.numel() == (num + 7) // 8, f"{bits.numel()} bytes cannot hold a mask of shape {tuple(shape)}"
    flat = np.unpackbits(bits.numpy(), count=num, bitorder="little").astype(np.bool_)
    return torch.from_numpy(flat).view(*shape)


def mask_digest(masks: Masks) -> str:
    """sha256 (hex) of names, shapes and bits of all masks, in their order."""
    sha = hashlib.sha256()
    for name, mask in masks.items():
        sha.update(f"{name}{tuple(mask.shape)}".encode())
        sha.update(pack_mask(mask).numpy().tobytes())
    return sha.hexdigest()


def layer_digests(masks: Masks) -> dict[str, int]:
    """A 63-bit fingerprint per layer, for the comparison between ranks."""
    return {
        name: int.from_bytes(hashlib.sha256(pack_mask(mask).numpy().tobytes()).digest()[:8], "big") >> 1 for name, mask in masks.items()
    }

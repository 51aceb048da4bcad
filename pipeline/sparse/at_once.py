"""What a device computes for all layers at once, because every single operation has to be launched."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.sparse.select import hash_words

GROUP = 1 << 27  # values that are brought together at most: bounds the memory, and torch sorts fewer than 2³¹


def groups(parts: Sequence[Tensor]) -> Iterator[slice]:
    """Cut ``parts`` into stretches of at most ``GROUP`` values, or of one part, in order."""
    start = num = 0
    for stop, part in enumerate(parts):
        if stop > start and num + part.numel() > GROUP:
            yield slice(start, stop)
            start, num = stop, 0
        num += part.numel()
    yield slice(start, len(parts))


def fingerprint(masks: Sequence[Tensor]) -> Tensor:
    """Return a 64-bit hash of the masks (bool, on a device), in the order of their memory: int64 []."""
    hashes = []
    for group in groups(masks):
        parts = [in_memory_order(mask) for mask in masks[group]]
        padding = parts[0].new_zeros(-sum(map(len, parts)) % 8)
        hashes.append(hash_words(torch.cat([*parts, padding]).view(torch.int64), key=group.start).sum())
    return functools.reduce(torch.add, hashes)


def num_nonzero_outside(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return how many values are not 0 (such as NaN) where the masks, bool and of the same shapes, are False: [].

    Tensors and masks are on a device; nothing is read back to the host.
    """
    numbers = []
    for group in groups(tensors):
        pairs = [_alike(*pair) for pair in zip(tensors[group], masks[group], strict=True)]
        values, are_active = (torch.cat(column) for column in zip(*pairs, strict=True))
        numbers.append((values.ne(0) & ~are_active).sum())
    return functools.reduce(torch.add, numbers)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements in the order of memory, [n]: a view, unless there are gaps in it."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor.detach().as_strided((tensor.numel(),), (1,))
    return tensor.detach().reshape(-1)


def _alike(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both flat, in one order."""
    if tensor.stride() == mask.stride():
        return in_memory_order(tensor), in_memory_order(mask)
    return tensor.detach().reshape(-1), mask.reshape(-1)

"""Exact selection, keyed randomness and masking, with the same result on every rank, device and world size.

On the CPU, numpy does the work, and numba compiles four loops if it is installed; without it numpy
computes the same, more slowly. On other devices everything stays on the device; functions that read
a value back to the host say so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.sparse import at_once
from pipeline.sparse.at_once import INCREMENT, MULTIPLIERS

_UINT64 = (1 << 64) - 1
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
_FEW = 1 << 17  # up to this number of scores, a partition is faster than histograms
_CHUNK = 1 << 14  # positions hashed at a time, so that they stay in the cache


# -- selection


def lowest_k(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` smallest of ``scores`` [n]; of equal scores the lower index is marked.

    Returns bool [n] with exactly ``k`` True. The caller must check that no score is NaN, because NaN
    has no place in an order.
    """
    return lowest_k_of([scores], k)[0]


def highest_k(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` largest of ``scores`` [n]; of equal scores the lower index is marked.

    Returns bool [n] with exactly ``k`` True.
    """
    return highest_k_of([scores], k)[0]


def lowest_k_of(parts: Sequence[Tensor], k: int) -> list[Tensor]:
    """:func:`lowest_k` of the concatenation of ``parts``, without concatenating them on the CPU."""
    return _mark(parts, k, torch.lt, k)


def highest_k_of(parts: Sequence[Tensor], k: int) -> list[Tensor]:
    """:func:`highest_k` of the concatenation of ``parts``."""
    return _mark(parts, k, torch.gt, sum(part.numel() for part in parts) - k + 1)


def highest_per_row(scores: Tensor, quotas: Tensor) -> Tensor:
    """Mark the ``quotas[i]`` largest scores of each row i of ``scores`` [rows, size].

    Of equal scores the lower index is marked. Returns bool [rows, size].
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    is_within = torch.arange(scores.shape[1], device=scores.device) < quotas[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, is_within)


def strongest_of_norms(values: Tensor, indices: Tensor, shape: Sequence[int], norm_shape: Sequence[int]) -> Tensor:
    """Mark the largest |value| of each norm; of equal ones the lower index.

    Args:
        values: of the weight at ``indices`` [n], which are ascending.
        indices: in the weight's logical order.
        shape: of the weight.
        norm_shape: of its norms, with 1 for every dimension that one of them is taken over.

    Returns:
        bool [n], with at most one True per norm.
    """
    norms = torch.arange(math.prod(norm_shape), device=values.device).view(*norm_shape).expand(*shape)
    norm_of = norms.reshape(-1)[indices]
    strongest_first = values.abs().argsort(descending=True, stable=True)
    by_norm = strongest_first[norm_of[strongest_first].argsort(stable=True)]
    first = torch.ones_like(by_norm, dtype=torch.bool)
    first[1:] = norm_of[by_norm][1:] != norm_of[by_norm][:-1]
    return torch.zeros_like(first).index_put_((by_norm,), first)


def highest_k_each(parts: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """:func:`highest_k` of each part, with its own number."""
    if parts and not is_on_host(parts[0]):
        return at_once.highest_k(parts, numbers)
    return [highest_k(part, number) for part, number in zip(parts, numbers, strict=True)]


def positions_each(marks: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """Return the indices of the ``numbers[i]`` True entries of each part i [n], in ascending order: int64."""
    if marks and not is_on_host(marks[0]):
        return at_once.positions(marks, numbers)
    return [torch.from_numpy(np.flatnonzero(mark.numpy())) for mark in marks]


def spread(
    marks: Sequence[Tensor], indices: Sequence[Tensor], numbers: Sequence[int], sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return marks over whole layers from marks [k] of the positions ``indices`` [k], and what :func:`without` takes.

    ``numbers`` are those of the True marks, ``sizes`` those of the layers' positions.
    """
    if marks and not is_on_host(marks[0]):
        whole = at_once.spread(marks, indices, sizes)
        return whole, whole
    taken = [index[chosen] for index, chosen in zip(indices, positions_each(marks, numbers), strict=True)]
    empty = (torch.zeros(size, dtype=torch.bool) for size in sizes)
    return [mark.index_fill_(0, index, True) for mark, index in zip(empty, taken, strict=True)], taken


def taken_by(marks: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """Return what :func:`without` takes: the indices of the True entries, or on a device the marks themselves."""
    return positions_each(marks, numbers) if marks and is_on_host(marks[0]) else list(marks)


def without(parts: Sequence[Tensor], taken: Sequence[Tensor]) -> list[Tensor]:
    """Return scores that are the lowest possible value where positions are taken; on the CPU they are overwritten."""
    if not parts:
        return []
    lowest = -math.inf if parts[0].is_floating_point() else torch.iinfo(parts[0].dtype).min
    if not is_on_host(parts[0]):
        return at_once.without(parts, taken, lowest)
    return [part.index_fill_(0, indices, lowest) for part, indices in zip(parts, taken, strict=True)]


def either(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return ``a | b`` of each pair of bool tensors."""
    if one and not is_on_host(one[0]):
        return at_once.either(one, other)
    return [a | b for a, b in zip(one, other, strict=True)]


def both(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return ``a & b`` of each pair of bool tensors."""
    if one and not is_on_host(one[0]):
        return at_once.both(one, other)
    return [a & b for a, b in zip(one, other, strict=True)]


def count_true(marks: Sequence[Tensor]) -> list[int]:
    """Return the number of True entries of each tensor; one host read for all."""
    if all(is_on_host(mark) for mark in marks):
        return [
            int(np.count_nonzero(_in_memory_order(mark)) if _is_dense(mark) else torch.count_nonzero(mark))
            for mark in marks
        ]
    return at_once.count_true(marks)


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the tensor is on the CPU, where numpy can do the work."""
    return tensor.device.type == "cpu"


def _mark(parts: Sequence[Tensor], k: int, is_beyond: Callable[[Tensor, Tensor], Tensor], rank: int) -> list[Tensor]:
    """Mark the ``k`` scores beyond the ``rank``-th smallest (from 1); of scores equal to it, the lower indices."""
    n = sum(part.numel() for part in parts)
    if len({part.dtype for part in parts}) > 1:
        common = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        parts = [part.to(common) for part in parts]
    assert all(part.dim() == 1 for part in parts) and 0 <= k <= n, (
        f"cannot take {k} of {n} in {[tuple(part.shape) for part in parts]}"
    )
    if k == 0 or k == n:
        return [torch.full_like(part, k == n, dtype=torch.bool) for part in parts]
    if not is_on_host(parts[0]):
        scores = torch.cat(list(parts))
        threshold = scores.sort().values[rank - 1]
        chosen, tied = is_beyond(scores, threshold), scores == threshold
        return list(torch.split(chosen | tied & (tied.cumsum(0) <= k - chosen.sum()), [part.numel() for part in parts]))
    parts = [part.float() if part.dtype == torch.bfloat16 else part for part in parts]  # numpy has no bfloat16
    threshold = _smallest(parts, rank)
    marks = [is_beyond(part, threshold) for part in parts]
    missing = k - sum(int(torch.count_nonzero(mark)) for mark in marks)
    for part, mark in zip(parts, marks, strict=True):
        if missing == 0:
            break
        indices = np.flatnonzero((part == threshold).numpy())[:missing]  # ascending
        mark[torch.from_numpy(indices)] = True
        missing -= len(indices)
    return marks


def _smallest(parts: Sequence[Tensor], rank: int) -> Tensor:
    """Return the ``rank``-th smallest score, counted from 1, on the host."""
    dtype, kernels = parts[0].dtype, _kernels()
    if kernels is None or dtype not in (torch.float32, torch.int32) or sum(part.numel() for part in parts) < _FEW:
        scores = np.concatenate([part.numpy() for part in parts])
        return torch.as_tensor(np.partition(scores, rank - 1)[rank - 1], dtype=dtype)
    # Two histograms of 16 bits each: the time does not depend on the distribution (partition is
    # thirty times slower on 90% equal scores).
    is_float = dtype == torch.float32
    bits = [part.contiguous().numpy().view(np.int32) for part in parts]
    high = low = 0
    for is_first in (True, False):
        histogram = np.zeros(1 << 16, dtype=np.int64)
        for part in bits:
            kernels.count(part, is_float, is_first, np.int32(high), histogram)
        bucket = int(np.searchsorted(np.cumsum(histogram), rank))
        rank -= int(histogram[:bucket].sum())
        high, low = (bucket - (1 << 15), 0) if is_first else (high, bucket)
    key = np.array([high << 16 | low], dtype=np.int32)
    return torch.from_numpy(_float_order(key).view(np.float32) if is_float else key)[0]


def _float_order(bits: Any) -> Any:
    """Map float32 bit patterns (int32) to integers in the order of the floats. It is its own inverse."""
    return np.where(bits >= 0, bits, bits ^ np.int32(0x7FFFFFFF))


# -- keyed randomness


def _mix(x: int) -> int:
    """Apply the finaliser of splitmix64 to a Python integer."""
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & _UINT64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & _UINT64
    return x ^ (x >> 31)


def key_of(*parts: int) -> int:
    """Return a 64-bit key from integers such as seed, update index and layer; their order matters."""
    key = 0
    for part in parts:
        key = _mix((key + INCREMENT + (part & _UINT64)) & _UINT64)
    return key


def keyed_hash(key: int, num: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the splitmix64 hashes of the positions 0 … num−1 under ``key``, cut to 31 bits: int32 [num].

    The hashes are the same on every device.
    """
    out = torch.empty(num, dtype=torch.int32, device=device)
    if not is_on_host(out):
        return at_once.hash_positions(key, num, out.device)
    kernels = _kernels()
    (kernels.hash if kernels else _hash_in_numpy)(np.uint64(key), out.numpy())
    return out


def _hash_in_numpy(key: np.uint64, out: np.ndarray[Any, Any]) -> None:
    base = np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(INCREMENT) + key
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        x = base[: len(part)] + np.uint64((start * INCREMENT) & _UINT64)
        for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(multiplier)
        x ^= x >> np.uint64(31)
        part[:] = x >> np.uint64(33)


# -- masking


@torch.no_grad()
def multiply_by_masks(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set every tensor to +0.0 where its mask (bool, same shape) is False, in place.

    The bits are masked, so that neither a NaN nor a sign remains. This is fastest if both have the
    same memory format: on the CPU it is then one pass that reads one byte per mask entry.
    """
    kernels = _kernels()
    for tensor, mask in pairs:
        if not _are_alike(tensor, mask):
            tensor.view(_BITS[tensor.element_size()]).mul_(mask)
            continue
        bits = _in_memory_order(tensor).view(np.int32)
        if kernels:
            kernels.mask(bits, _in_memory_order(mask).view(np.int8))
        else:
            np.multiply(bits, _in_memory_order(mask), out=bits)


@torch.no_grad()
def are_nonzero_outside(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[bool]:
    """Return for each pair whether the tensor has a value other than 0 (such as NaN) where its mask is False.

    The masks are bool, in the tensors' shapes. One host read for all.
    """
    kernels = _kernels()
    found: list[Tensor] = []
    for tensor, mask in pairs:
        if kernels and _are_alike(tensor, mask):
            found.append(
                torch.tensor(
                    kernels.is_nonzero_outside(_in_memory_order(tensor), _in_memory_order(mask).view(np.uint8))
                )
            )
        else:
            found.append((tensor.ne(0) & ~mask).any())
    answers: list[bool] = torch.stack(found).tolist() if found else []
    return answers


def _are_alike(tensor: Tensor, mask: Tensor) -> bool:
    """Return whether numpy can go through both in the order of their memory."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.stride() == mask.stride() and _is_dense(tensor)


def _in_memory_order(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the elements of a dense tensor on the host in the order of memory: a view, [n]."""
    return (tensor.detach() if tensor.requires_grad else tensor).numpy().ravel("K")


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one stretch of memory, in any order."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


class _Kernels:
    """The loops that are worth compiling.

    With 25 million weights and one thread, masking takes 7 ms instead of 11, hashing 28 ms instead
    of 134, and ranking 70 ms, even if nine tenths of the scores are equal, where a partition takes
    1300 ms.
    """

    def __init__(self, compiler: Any) -> None:
        first, second = (np.uint64(m) for m in MULTIPLIERS)
        increment = np.uint64(INCREMENT)
        sign = np.int32(-(1 << 31))

        def mask(bits: Any, is_active: Any) -> None:
            for i in range(bits.size):
                bits[i] &= -np.int32(is_active[i])

        def is_nonzero_outside(values: Any, is_active: Any) -> Any:
            num = 0
            for i in range(values.size):
                num += (values[i] != 0) & (is_active[i] == 0)
            return num > 0

        def hash_positions(key: Any, out: Any) -> None:
            for i in range(out.size):
                x = np.uint64(i + 1) * increment + key
                x = (x ^ (x >> np.uint64(30))) * first
                x = (x ^ (x >> np.uint64(27))) * second
                out[i] = (x ^ (x >> np.uint64(31))) >> np.uint64(33)

        def count(bits: Any, is_float: bool, is_first: bool, high: Any, histogram: Any) -> None:
            for i in range(bits.size):
                key = bits[i]
                if is_float:
                    key = (
                        np.int32(0) if key == sign else (key if key >= 0 else key ^ np.int32(0x7FFFFFFF))
                    )  # -0.0 equals 0.0
                if is_first:
                    histogram[(key >> 16) + (1 << 15)] += 1
                elif key >> 16 == high:
                    histogram[key & 0xFFFF] += 1

        self.mask, self.is_nonzero_outside = compiler(mask), compiler(is_nonzero_outside)
        self.hash, self.count = compiler(hash_positions), compiler(count)


@functools.cache
def _kernels() -> _Kernels | None:
    try:
        import numba
    except ImportError:
        return None
    # every flag is given: numba takes a missing one from its environment or from the function that it is compiling
    flags = {"nogil": True, "fastmath": False, "error_model": "python", "forceinline": False, "parallel": False}
    return _Kernels(numba.njit(**flags, boundscheck=False, debug=False, _nrt=True))

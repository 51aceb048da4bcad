"""Exact selection and keyed randomness: every rank, device and world size makes the same choice from the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_UINT64 = (1 << 64) - 1
_SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
_SPLITMIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def lowest_k(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` smallest of ``scores`` [n]; of equal scores the lower index is marked. Returns bool [n] with exactly ``k`` True.

    NaN is not allowed (the caller checks): an ordering with NaN is not an ordering.
    """
    return _mark(scores, k, torch.lt, k)


def highest_k(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` largest of ``scores`` [n]; of equal scores the lower index is marked. Returns bool [n] with exactly ``k`` True."""
    return _mark(scores, k, torch.gt, scores.numel() - k + 1)


def _mark(scores: Tensor, k: int, is_beyond: Callable[[Tensor, Tensor], Tensor], rank: int) -> Tensor:
    """Mark the ``k`` scores beyond the ``rank``-th smallest, ties with it by index."""
    n = scores.numel()
    assert scores.dim() == 1 and 0 <= k <= n, f"cannot take {k} of {tuple(scores.shape)}"
    if k == 0 or k == n:
        return torch.full((n,), k == n, dtype=torch.bool, device=scores.device)
    threshold = _smallest(scores, rank)
    chosen = is_beyond(scores, threshold)
    tied = (scores == threshold).nonzero().squeeze(1)  # in index order
    chosen[tied[: k - int(torch.count_nonzero(chosen))]] = True
    return chosen


def _smallest(scores: Tensor, rank: int) -> Tensor:
    """The ``rank``-th smallest score, from 1. On the CPU numpy's partition is several times faster than torch's kthvalue."""
    if scores.device.type != "cpu" or scores.dtype == torch.bfloat16:
        return scores.kthvalue(rank).values
    return torch.as_tensor(np.partition(scores.numpy(), rank - 1)[rank - 1], dtype=scores.dtype)


def _mix(x: int) -> int:
    """The splitmix64 finaliser, on Python integers."""
    x = ((x ^ (x >> 30)) * _SPLITMIX_MULTIPLIERS[0]) & _UINT64
    x = ((x ^ (x >> 27)) * _SPLITMIX_MULTIPLIERS[1]) & _UINT64
    return x ^ (x >> 31)


def key_of(*parts: int) -> int:
    """Fold integers (seed, update index, layer, …) into one 64-bit key; the order of the parts matters."""
    key = 0
    for part in parts:
        key = _mix((key + _SPLITMIX_INCREMENT + (part & _UINT64)) & _UINT64)
    return key


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 ``>>`` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_hash(key: int, num: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Pseudo-random integers of the positions 0 … num−1 under ``key``: splitmix64 cut to 63 bits. int64 [num], the same on every device."""
    x = torch.arange(1, num + 1, dtype=torch.int64, device=device)
    x = x * _signed(_SPLITMIX_INCREMENT) + _signed(key)  # int64 arithmetic wraps, as uint64 does
    x = (x ^ _shift_right(x, 30)) * _signed(_SPLITMIX_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_SPLITMIX_MULTIPLIERS[1])
    return _shift_right(x ^ _shift_right(x, 31), 1)

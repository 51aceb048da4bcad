"""What a device computes for all layers at once, because every operation has to be launched.

Parts are flat tensors on a device, one per layer. Unless it is said, nothing is read back to the host.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Values that are brought together at most, which bounds the memory; torch sorts fewer than 2³¹.
GROUP = 1 << 25
INCREMENT = 0x9E3779B97F4A7C15  # of splitmix64
_UINT64 = (1 << 64) - 1
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def groups(parts: Sequence[Tensor]) -> Iterator[slice]:
    """Cut ``parts`` into stretches of at most ``GROUP`` values, or of one part, in order."""
    start = num = 0
    for stop, part in enumerate(parts):
        if stop > start and num + part.numel() > GROUP:
            yield slice(start, stop)
            start, num = stop, 0
        num += part.numel()
    if parts:
        yield slice(start, len(parts))


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements in the order of memory, [n]: a view, unless there are gaps in it."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor.detach().as_strided((tensor.numel(),), (1,))
    return tensor.detach().reshape(-1)


# -- selection


def count_true(marks: Sequence[Tensor]) -> list[int]:
    """Return the number of True entries of each tensor, of any shape; one host read for all."""
    ends, starts = [], []
    for group in groups(marks):
        flat = [in_memory_order(mark) for mark in marks[group]]
        bounds = list(itertools.accumulate((len(part) for part in flat), initial=0))
        dtype = torch.int32 if bounds[-1] < 1 << 31 else torch.int64
        totals = torch.cat([flat[0].new_zeros(1), *flat]).cumsum(0, dtype=dtype)
        starts += [totals[bound] for bound in bounds[:-1]]
        ends += [totals[bound] for bound in bounds[1:]]
    if not ends:
        return []
    numbers: list[int] = torch.stack([*starts, *ends]).tolist()
    return [end - start for start, end in zip(numbers[: len(starts)], numbers[len(starts) :], strict=True)]


def positions(marks: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """Return the ascending indices of the True entries of each part, of which there are ``numbers``: int64."""
    found: list[Tensor] = []
    for group in groups(marks):
        flat = torch.cat(list(marks[group])).logical_not().view(torch.uint8)
        # ``nonzero`` would have to tell the host how many there are
        indices = flat.argsort(stable=True)[: sum(numbers[group])]
        parts = torch.split(indices, list(numbers[group]))
        found += torch._foreach_sub(parts, _starts(marks[group]))  # type: ignore[arg-type]
    return found


def highest_k(parts: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    """Mark the ``numbers[i]`` largest of each part i; of equal scores the lower index. Returns bool parts."""
    marks: list[Tensor] = []
    for group in groups(parts):
        sizes = [len(part) for part in parts[group]]
        order = _best_first(torch.cat(list(parts[group])), sizes)
        yes, no = order.new_ones(max(sizes), dtype=torch.bool), order.new_zeros(max(sizes), dtype=torch.bool)
        cuts = zip(sizes, numbers[group], strict=True)
        is_chosen = torch.cat([half for size, num in cuts for half in (yes[:num], no[: size - num])])
        marks += torch.split(torch.empty_like(is_chosen).scatter_(0, order, is_chosen), sizes)
    return marks


def _best_first(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the order of the parts of ``sizes`` one after the other, each with its highest score first."""
    order = scores.argsort(descending=True, stable=True)
    return order if len(sizes) < 2 else order[_part_of(sizes, order)[order].argsort(stable=True)]


def _part_of(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return for each value the number of its part: int32."""
    numbers = torch.arange(len(sizes), dtype=torch.int32, device=like.device)
    return torch.cat([number.expand(size) for number, size in zip(numbers, sizes, strict=True)])


def sign_aware(parts: Sequence[Tensor]) -> list[Tensor]:
    """Compute ``criteria.sign_aware`` of each part."""
    scores: list[Tensor] = []
    for group in groups(parts):
        sizes, values = [len(part) for part in parts[group]], torch.cat(list(parts[group]))
        order, part_of = _best_first(values.abs(), sizes), _part_of(sizes, values)
        ends = [end - 1 for end in itertools.accumulate(sizes)]
        is_negative = (values < 0)[order]
        shares = []
        for is_sign in (~is_negative, is_negative):
            counted = torch.cat([is_sign.new_zeros(1), is_sign]).cumsum(0)
            last = torch.stack([counted[end + 1] for end in ends])
            num = last.diff(prepend=counted[:1])
            shares.append((last[part_of] + 1 - counted[1:]).double() / num[part_of])
        found = torch.where(is_negative, shares[1], shares[0])
        scores += torch.split(torch.empty_like(found).scatter_(0, order, found), sizes)
    return scores


def spread(marks: Sequence[Tensor], indices: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return bool parts of ``sizes`` that are True at those ``indices`` whose mark is True."""
    whole: list[Tensor] = []
    empties = [mark.new_empty(()).expand(size) for mark, size in zip(marks, sizes, strict=True)]
    for group in groups(empties):
        moved = torch._foreach_add(list(indices[group]), _starts(empties[group]))  # type: ignore[arg-type]
        flat = marks[group][0].new_zeros(sum(sizes[group]))
        whole += torch.split(
            flat.scatter_(0, torch.cat(list(moved)), torch.cat(list(marks[group]))), list(sizes[group])
        )
    return whole


def without(parts: Sequence[Tensor], marks: Sequence[Tensor], lowest: float) -> list[Tensor]:
    """Return the parts with ``lowest`` wherever ``marks`` is True."""
    left: list[Tensor] = []
    for group in groups(parts):
        scores = torch.cat(list(parts[group])).masked_fill_(torch.cat(list(marks[group])), lowest)
        left += torch.split(scores, [len(part) for part in parts[group]])
    return left


def either(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return ``a | b`` of each pair of bool tensors."""
    return _as_bool(torch._foreach_maximum(_as_bytes(one), _as_bytes(other)))


def both(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return ``a & b`` of each pair of bool tensors."""
    return _as_bool(torch._foreach_minimum(_as_bytes(one), _as_bytes(other)))


def _as_bytes(marks: Sequence[Tensor]) -> Any:
    return [mark.view(torch.uint8) for mark in marks]


def _as_bool(numbers: Any) -> list[Tensor]:
    return [number.view(torch.bool) for number in numbers]


def _starts(parts: Sequence[Tensor]) -> list[int]:
    """Return where each part starts among all."""
    return list(itertools.accumulate((part.numel() for part in parts), initial=0))[:-1]


# -- hashes, in int64, whose arithmetic wraps as in uint64


def hash_positions(key: int, num: int, device: torch.device) -> Tensor:
    """Compute ``select.keyed_hash`` on a device: int32 [num]."""
    return _shift_right(_mix(_counter(key, num, device)), 33).to(torch.int32)


def hash_each(keys: Sequence[int], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Compute ``select.keyed_hash`` of each pair of key and size: int32 [size] each."""
    hashes: list[Tensor] = []
    empty = torch.empty((), dtype=torch.int32, device=device)
    for group in groups([empty.expand(size) for size in sizes]):
        counter = _counter(0, sum(sizes[group]), device)
        parts, starts = torch.split(counter, list(sizes[group])), itertools.accumulate(sizes[group], initial=0)
        offsets = [
            _signed((key - start * INCREMENT) & _UINT64) for key, start in zip(keys[group], starts, strict=False)
        ]
        torch._foreach_add_(parts, offsets)  # each part counts from 1, from its key
        hashes += torch.split(_shift_right(_mix(counter), 33).to(torch.int32), list(sizes[group]))
    return hashes


def prefer_unmarked(scores: Sequence[Tensor], marks: Sequence[Tensor]) -> list[Tensor]:
    """Halve the scores, int32 below 0, and raise those without a mark above all others."""
    preferred: list[Tensor] = []
    for group in groups(scores):
        unmarked = torch.cat(list(marks[group])).logical_not()
        flat = torch.cat(list(scores[group])).bitwise_right_shift_(1).add_(unmarked, alpha=1 << 30)
        preferred += torch.split(flat, [len(part) for part in scores[group]])
    return preferred


def fingerprint(masks: Sequence[Tensor]) -> Tensor:
    """Return a 64-bit hash of the masks (bool, of any shape), in the order of their memory: int64 []."""
    hashes = []
    for group in groups(masks):
        parts = [in_memory_order(mask) for mask in masks[group]]
        words = torch.cat([*parts, parts[0].new_zeros(-sum(map(len, parts)) % 8)]).view(torch.int64)
        hashes.append(_mix(_counter(group.start, len(words), words.device).add_(words)).sum())
    return functools.reduce(torch.add, hashes)


def num_nonzero_outside(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return how many values are not 0 (such as NaN) where the masks, bool and of the same shapes, are False: []."""
    numbers = []
    for group in groups(tensors):
        pairs = [_alike(*pair) for pair in zip(tensors[group], masks[group], strict=True)]
        values, are_active = (torch.cat(column) for column in zip(*pairs, strict=True))
        numbers.append((values.ne(0) & ~are_active).sum())
    return functools.reduce(torch.add, numbers)


def _alike(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both flat, in one order."""
    if tensor.stride() == mask.stride():
        return in_memory_order(tensor), in_memory_order(mask)
    return tensor.detach().reshape(-1), mask.reshape(-1)


def _counter(key: int, num: int, device: torch.device) -> Tensor:
    x = torch.arange(1, num + 1, dtype=torch.int64, device=device)
    return x.mul_(_signed(INCREMENT)).add_(_signed(key))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros; ``>>`` of int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

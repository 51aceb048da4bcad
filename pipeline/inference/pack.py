"""Weights as the kernels read them: entries {offset, G weights} of blocks of input channels and groups of outputs.

An entry of one weight takes six bytes where 16 bits are enough for the offsets of a layer: they count
from the first place that the block reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.layout import LINE, round_up
from pipeline.memory import private_memory

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """The active weights of one layer: of output o, input channel c of its group and kernel tap t."""

    outputs: Ints
    inputs: Ints  # of all groups' channels
    taps: Ints
    values: npt.NDArray[np.float32]
    num_outputs: int
    num_inputs: int  # channels, of all groups
    groups: int

    @property
    def density(self) -> float:
        """Active weights over all that the kernel's taps could have."""
        taps = int(self.taps.max()) + 1 if self.taps.size else 1
        return self.values.size / max(1, self.num_outputs * (self.num_inputs // self.groups) * taps)

    def without_arrays(self) -> Weights:
        """Keep the numbers of outputs, inputs and groups only."""
        none = self.outputs[:0].copy()
        return Weights(none, none, none, self.values[:0].copy(), self.num_outputs, self.num_inputs, self.groups)


def active_weights(
    weight: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_] | None,
    *,
    scale: npt.NDArray[np.float32],
    groups: int,
    taps: Mapping[tuple[int, int], int],
) -> Weights:
    """List the active weights of a layer.

    Args:
        weight: [outputs, inputs / groups, height, width] or [outputs, inputs].
        mask: of the same shape, True = active; None: all that are not 0.
        scale: [outputs], multiplied in.
        groups: of channels.
        taps: number of each tap (row, column) of the kernel that is used.
    """
    weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
    active = weight != 0 if mask is None else mask.reshape(weight.shape)
    of_tap = np.full(weight.shape[2:], -1, np.int64)
    for tap, number in taps.items():
        of_tap[tap] = number
    outputs, inputs, rows, columns = np.nonzero(active & (of_tap >= 0))
    values = weight[outputs, inputs, rows, columns] * scale[outputs]
    num_outputs, num_inputs = weight.shape[0], weight.shape[1] * groups
    inputs = inputs + outputs // (num_outputs // groups) * weight.shape[1]
    return Weights(outputs, inputs, of_tap[rows, columns], values.astype(np.float32), num_outputs, num_inputs, groups)


@dataclass(frozen=True)
class Packed:
    """Entries of a layer: words, of which the first is an offset and the others are the weights' bits.

    Groups with many entries come first. Loops over neighbouring groups are then equally long, which
    the processor's branch prediction learns.
    """

    entries: npt.NDArray[np.int32] | npt.NDArray[np.uint16]  # [entries, 1 + group]; with 16 bits [entries, 3]
    bases: npt.NDArray[np.int32]  # [blocks]: added to the offsets of a block
    counts: npt.NDArray[np.int32]  # [blocks, groups of outputs + 1]: where the entries of a group start
    order: npt.NDArray[np.int32]  # [blocks, groups of outputs]: first output of each group

    @property
    def is_short(self) -> bool:
        """Whether offsets have 16 bits."""
        return self.entries.dtype == np.uint16

    @property
    def num_bytes(self) -> int:
        """Memory of the entries."""
        return self.entries.nbytes + self.bases.nbytes + self.counts.nbytes + self.order.nbytes


def may_group(weights: Weights, group: int, *, is_rounded_up: bool = False) -> bool:
    """Whether ``group`` outputs can share entries: they read the same channels, and there are no rows left over."""
    per_group = weights.num_outputs // weights.groups
    return per_group % group == 0 or (is_rounded_up and weights.groups == 1)


def pack(weights: Weights, offsets: Ints, group: int, blocks: int, *, may_be_short: bool = True) -> Packed:
    """Pack the weights of a layer for ``group`` outputs at a time and ``blocks`` blocks of input channels.

    Args:
        weights: of the layer.
        offsets: [inputs, taps], where a tap of a channel lies.
        group: outputs that share an entry; inactive weights among them are stored as 0.
        blocks: of input channels, which are computed one after the other.
        may_be_short: use offsets of 16 bits where they are enough; the kernels of linear layers read none, and
            have no bases either.
    """
    num_groups = -(-weights.num_outputs // group)
    num_taps = offsets.shape[1]
    block = weights.inputs * blocks // weights.num_inputs
    place = weights.inputs * num_taps + weights.taps
    num_places = weights.num_inputs * num_taps
    key = (block * num_groups + weights.outputs // group) * num_places + place
    is_sorted = group == blocks == 1  # np.nonzero lists them so
    unique, entry = (key, np.arange(key.size)) if is_sorted else np.unique(key, return_inverse=True)
    of_group = unique // num_places  # block and group of each entry
    counts = np.bincount(of_group, minlength=blocks * num_groups).reshape(blocks, num_groups)
    order = np.argsort(-counts, axis=1, kind="stable")
    rank = np.argsort(order, axis=1) + np.arange(blocks)[:, None] * num_groups
    moved = np.argsort(rank.reshape(-1)[of_group], kind="stable")
    bases = np.zeros(blocks, np.int64)
    places, block_of = offsets.reshape(-1)[unique % num_places], of_group // num_groups
    if may_be_short:
        bases[:] = np.iinfo(np.int64).max
        np.minimum.at(bases, block_of, places)
        bases[np.bincount(block_of, minlength=blocks) == 0] = 0
        places = places - bases[block_of]
    if may_be_short and group == 1 and places.max(initial=0) <= np.iinfo(np.uint16).max:
        words: Any = np.empty((unique.size, 3), np.uint16)
        words[entry, 1:] = weights.values.view(np.uint16).reshape(-1, 2)
    else:
        words = np.zeros((unique.size, 1 + group), np.int32)
        words[entry, 1 + weights.outputs % group] = weights.values.view(np.int32)
    words[:, 0] = places
    ends = np.concatenate([[0], np.cumsum(np.take_along_axis(counts, order, 1))])
    starts = np.arange(blocks)[:, None] * num_groups + np.arange(num_groups + 1)
    return Packed(words[moved], bases.astype(np.int32), ends[starts].astype(np.int32), (order * group).astype(np.int32))


def gathered(packed: Iterable[Packed | None]) -> list[Packed]:
    """Put the entries of all layers into one piece of memory, so that none is lost between freed arrays."""
    layers = [each for each in packed if each is not None]
    starts = np.cumsum([0, *(round_up(each.entries.nbytes, LINE * 4) for each in layers)]).tolist()
    memory = private_memory(starts.pop())
    found = []
    for each, start in zip(layers, starts, strict=True):
        dtype, shape = each.entries.dtype, each.entries.shape
        entries: Any = np.frombuffer(memory, dtype, each.entries.size, offset=start).reshape(shape)
        entries[...] = each.entries
        found.append(replace(each, entries=entries))
    return found

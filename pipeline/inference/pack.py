"""Weights as the kernels read them: entries {offset, G weights} of blocks of input channels and groups of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    """Entries of a layer: int32 words, each an offset and then the weights' bits."""

    entries: npt.NDArray[np.int32]  # [entries, 1 + group]
    counts: npt.NDArray[np.int32]  # [blocks, groups of outputs + 1]: where the entries of a group start

    @property
    def num_bytes(self) -> int:
        """Memory of the entries."""
        return self.entries.nbytes + self.counts.nbytes


def may_group(weights: Weights, group: int, *, is_rounded_up: bool = False) -> bool:
    """Whether ``group`` outputs can share entries: they read the same channels, and there are no rows left over."""
    per_group = weights.num_outputs // weights.groups
    return per_group % group == 0 or (is_rounded_up and weights.groups == 1)


def pack(weights: Weights, offsets: Ints, group: int, blocks: int) -> Packed:
    """Pack the weights of a layer for ``group`` outputs at a time and ``blocks`` blocks of input channels.

    Args:
        weights: of the layer.
        offsets: [inputs, taps], where a tap of a channel lies.
        group: outputs that share an entry; inactive weights among them are stored as 0.
        blocks: of input channels, which are computed one after the other.
    """
    num_groups = -(-weights.num_outputs // group)
    num_taps = offsets.shape[1]
    in_block = weights.inputs * blocks // weights.num_inputs
    # entries in the order of block, group, channel, tap
    key = in_block * num_groups + weights.outputs // group
    key = (key * weights.num_inputs + weights.inputs) * num_taps + weights.taps
    if group == 1 and blocks == 1:
        unique, entry, num_entries = key, np.arange(key.size), key.size  # the order of np.nonzero
    else:
        unique, entry = np.unique(key, return_inverse=True)
        num_entries = unique.size
    words = np.zeros((num_entries, 1 + group), np.int32)
    tap_key = unique % (weights.num_inputs * num_taps)
    words[:, 0] = offsets.reshape(-1)[tap_key]
    words[entry, 1 + weights.outputs % group] = weights.values.view(np.int32)
    per_group = np.bincount(unique // (weights.num_inputs * num_taps), minlength=blocks * num_groups)
    ends = np.concatenate([[0], np.cumsum(per_group)])
    starts = np.arange(blocks)[:, None] * num_groups + np.arange(num_groups + 1)
    return Packed(words, ends[starts].astype(np.int32))

"""Where structured sparsity may put its weights: N of every M, the same fan-in for every output, or whole blocks.

A layout views a weight as a flat list of **units**, of which some are active: single weights, or
blocks of them. Rows, where there are any, are stretches of consecutive units which regrow what they
lost, so that each keeps its number of active units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sparse.select import highest_k, highest_per_row
from pipeline.sparse.strategy import parse_structure


@dataclass(frozen=True)
class Layout:
    """How one weight of ``shape`` falls into units. For ``none`` units are the weights in logical, contiguous order."""

    shape: tuple[int, ...]
    structure: str = "none"

    def unsupported_reason(self) -> str:
        """Return why this shape cannot have this structure; empty if it can."""
        kind, first, second = parse_structure(self.structure)
        if kind == "n:m" and self.shape[1] % second:
            return f"{self.shape[1]} inputs are not a multiple of {second}"
        if kind == "block" and (self.shape[0] % first or self.shape[1] % second):
            return f"{self.shape[0]}×{self.shape[1]} outputs and inputs cannot be cut into blocks of {first}×{second}"
        return ""

    @property
    def unit_size(self) -> int:
        """Weights per unit."""
        kind, height, width = parse_structure(self.structure)
        return height * width if kind == "block" else 1

    @property
    def num_units(self) -> int:
        """Units in the weight."""
        return math.prod(self.shape) // self.unit_size

    @property
    def row_size(self) -> int | None:
        """Units per row; None where the layer is one pool."""
        kind, _, group = parse_structure(self.structure)
        return {"n:m": group, "fan_in": math.prod(self.shape[1:])}.get(kind)

    def num_active(self, count: int) -> int:
        """The number of active units for about ``count`` active weights."""
        kind, kept, group = parse_structure(self.structure)
        if kind == "n:m":
            return self.num_units // group * kept
        if kind == "fan_in":
            return self.shape[0] * max(1, round(count / self.shape[0]))
        return round(count / self.unit_size)

    def to_units(self, tensor: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce a tensor to one value per unit: [units].

        Args:
            tensor: of ``shape``, or flat in its logical order.
            reduce: function from [units, unit size] to [units].
        """
        kind, height, width = parse_structure(self.structure)
        if kind == "n:m":  # groups of inputs, with those of one kernel position together
            return tensor.reshape(self.shape).movedim(1, -1).reshape(-1)
        if kind == "block":
            rows, columns = self.shape[0] // height, self.shape[1] // width
            blocks = tensor.reshape(rows, height, columns, width, -1).permute(
                0, 2, 4, 1, 3
            )  # rows, columns, kernel positions, height, width
            return reduce(blocks.reshape(-1, height * width))
        return tensor.reshape(-1)

    def to_mask(self, units: Tensor) -> Tensor:
        """Expand one bool per unit, [units], to a mask of ``shape``; the inverse of :meth:`to_units`."""
        kind, height, width = parse_structure(self.structure)
        if kind == "n:m":
            moved = (self.shape[0], *self.shape[2:], self.shape[1])
            return units.view(moved).movedim(-1, 1).contiguous()
        if kind == "block":
            rows, columns = self.shape[0] // height, self.shape[1] // width
            blocks = units.view(rows, columns, -1, 1, 1).expand(-1, -1, -1, height, width)
            return blocks.permute(0, 3, 1, 4, 2).reshape(self.shape)
        return units.view(self.shape)


def mean_of_units(values: Tensor) -> Tensor:
    """[units, unit size] -> [units]: what a unit is worth. Integers are keyed hashes: the first stands for all."""
    return values.mean(dim=1, dtype=torch.float64) if values.is_floating_point() else values[:, 0]


def first_of_units(values: Tensor) -> Tensor:
    """[units, unit size] -> [units], where all of a unit are equal (masks)."""
    return values[:, 0]


def fan_ins_after_ablation(salient: Tensor, num_active: int, min_salient: float) -> Tensor:
    """Return the fan-in of each output of a layer after neuron ablation (SRigL, arXiv 2305.02299).

    An output dies if it has no salient weight, or fewer than ``min_salient`` times the fan-in that
    every output has if none dies. Where the outputs that are left could not hold the layer's
    weights, those with the most salient weights live as well, and all that have equally many. The
    weights are spread evenly over the outputs that live; where that does not divide, those with the
    most salient weights have one more, and of equal ones those with the lower index.

    Args:
        salient: the salient weights: bool [outputs, inputs, *kernel].
        num_active: number of active weights of the layer, at least one per output.
        min_salient: share, in [0, 1].

    Returns:
        int64 [outputs], whose sum is ``num_active``; 0 for an output that dies.
    """
    counts = salient.flatten(1).sum(1)
    num_outputs, size = len(counts), salient[0].numel()
    # a product that differs from an integer only by rounding counts as that integer
    least = max(1, math.floor(min_salient * (num_active // num_outputs) * (1 + 1e-12)))
    most_first = counts.sort(descending=True, stable=True)
    lives = counts >= most_first.values[math.ceil(num_active / size) - 1].clamp(max=least)
    num_living = lives.sum()
    rank = most_first.indices.argsort()  # of each output, by its salient weights: those that die come last
    return torch.where(lives, num_active // num_living + (rank < num_active % num_living), 0)


def structured_masks(scores: Tensor, layout: Layout, num_active: int) -> Tensor:
    """Return the mask of the ``num_active`` units with the highest scores; if there are rows, equally many in each.

    ``scores`` are of the weight's shape or flat.
    """
    units = layout.to_units(scores, mean_of_units)
    if layout.row_size is None:
        return layout.to_mask(highest_k(units, num_active))
    rows = units.view(-1, layout.row_size)
    quotas = torch.full((len(rows),), num_active // len(rows), device=units.device)
    return layout.to_mask(highest_per_row(rows, quotas).view(-1))

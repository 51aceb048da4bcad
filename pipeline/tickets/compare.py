"""Compare two tickets: their masks, from the packed bits, and their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.tickets.format import PackedTicket, Ticket
from pipeline.tickets.verify import MASK, count_bits


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """The masks of a ticket as stored in its file: the bits and the number of weights of every layer."""

    bits: dict[str, Tensor]
    sizes: dict[str, int]

    @classmethod
    def of(cls, ticket: PackedTicket) -> Self:
        """Take the masks of a ticket that has been read."""
        sizes = {name: math.prod(item["shape"]) for name, item in ticket.layout.items() if item["kind"] == "sparse"}
        return cls({name: ticket.tensors[MASK + name] for name in sizes}, sizes)


@dataclass(frozen=True)
class Overlap:
    """Numbers of active weights that two masks share."""

    both: int  # active in both masks
    either: int  # active in at least one
    both_by_chance: float  # expected in both for random masks with the same number of active weights per layer

    @property
    def share(self) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for equal masks."""
        return self.both / self.either if self.either else 1.0

    @property
    def share_by_chance(self) -> float:
        """The share expected of independent random masks with the same number of active weights per layer."""
        either = self.both + self.either - self.both_by_chance
        return self.both_by_chance / either if either else 1.0


def mask_overlap(one: PackedMasks, other: PackedMasks) -> Overlap | None:
    """Overlap over all layers; None when the masks belong to different networks, or there are none."""
    if not one.sizes or one.sizes != other.sizes:
        return None
    both = either = 0
    by_chance = 0.0
    for name, size in one.sizes.items():
        a, b = one.bits[name].numpy(), other.bits[name].numpy()
        both += count_bits(a & b)
        either += count_bits(a | b)
        by_chance += count_bits(a) * count_bits(b) / size
    return Overlap(both, either, by_chance)


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two tickets."""

    name: str
    distance: float  # Euclidean, of the dense tensors
    relative: float  # distance divided by the norm of the first
    num_left: int  # active in the first only
    num_new: int  # active in the second only


def differences(one: Ticket, other: Ticket) -> list[TensorDifference]:
    """Compare two tickets of the same network tensor by tensor."""
    assert one.state.keys() == other.state.keys()
    found = []
    for name, first in one.state.items():
        a, b = first.double(), other.state[name].double()
        distance, norm = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a))
        left = new = 0
        if name in one.masks and name in other.masks:
            left = int((one.masks[name] & ~other.masks[name]).sum())
            new = int((other.masks[name] & ~one.masks[name]).sum())
        found.append(TensorDifference(name, distance, distance / norm if norm else float(distance > 0), left, new))
    return found

"""What to prune and what to grow, layer by layer, in logical, contiguous order.

A prune criterion gives a score to every active weight [n_active], and the lowest are pruned. A grow criterion gives a score to every
position [n], and the highest inactive ones grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sparse.select import key_of, keyed_hash


def magnitude(values: Tensor) -> Tensor:
    """|w|: the smallest are pruned first."""
    return values.abs()


PRUNE: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude}


@dataclass(frozen=True)
class GrowthInputs:
    """What a grow criterion may look at, in one layer."""

    gradient: Tensor | None  # dense, averaged over ranks and micro-batches; of the weight's shape
    num_weights: int
    device: torch.device
    seed: int
    update_index: int  # 1 for the first topology update
    layer: int  # position among the sparse layers


def gradient(inputs: GrowthInputs) -> Tensor:
    """|dense gradient| (RigL, arXiv 1911.11134): the largest grow first."""
    if inputs.gradient is None:  # a layer that took no part in this step
        return torch.zeros(inputs.num_weights, device=inputs.device)
    return inputs.gradient.detach().reshape(-1).abs()


def random(inputs: GrowthInputs) -> Tensor:
    """Uniform (SET): the smallest hashes of (seed, update index, layer, position), so there is no generator state to keep."""
    key = key_of(inputs.seed, inputs.update_index, inputs.layer)
    return -keyed_hash(key, inputs.num_weights, device=inputs.device)


GROW: dict[str, Callable[[GrowthInputs], Tensor]] = {"gradient": gradient, "random": random}
READS_GRADIENT = frozenset({"gradient"})

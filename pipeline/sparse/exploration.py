"""The ever-active set and R_s, the in-time over-parameterisation rate (ITOP, arXiv 2102.02887).

Masks are bool tensors in the weights' shapes, by name; True marks an active weight.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.sparse.masks import Masks
from pipeline.sparse.select import count_true, either


def num_active(masks: Masks) -> int:
    """Return the number of active weights of all layers."""
    return sum(count_true(list(masks.values())))


def num_weights(masks: Masks) -> int:
    """Return the number of weights of all layers, active or not."""
    return sum(mask.numel() for mask in masks.values())


def num_ablated(masks: Masks) -> int:
    """Return the number of outputs (first dimension) of all layers that have no active weight."""
    return sum(count_true([~mask.flatten(1).any(1) for mask in masks.values()]))


def density(masks: Masks) -> float:
    """Return the share of the weights of all layers that are active, in [0, 1]."""
    return num_active(masks) / num_weights(masks)


def explore(ever_active: Masks, masks: Masks) -> dict[str, Tensor]:
    """Return the ever-active set with the weights that are active in ``masks`` added (bool, in the weights' shapes)."""
    return dict(zip(masks, either([ever_active[name] for name in masks], list(masks.values())), strict=True))


def r_s(ever_active: Masks) -> float:
    """Return R_s = |union of all masks so far| / number of weights; it starts at the density and never falls."""
    return density(ever_active)


def density_of_layers(masks: Masks) -> dict[str, float]:
    """Return the share of active weights of each layer, by name; given the ever-active set, this is each layer's R_s.

    Reads all counts back to the host at once.
    """
    counts = count_true(list(masks.values()))
    return {name: count / mask.numel() for (name, mask), count in zip(masks.items(), counts, strict=True)}

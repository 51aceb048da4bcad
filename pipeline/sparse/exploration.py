"""The ever-active set and R_s, the in-time over-parameterisation rate (ITOP, arXiv 2102.02887)."""

from __future__ import annotations

from torch import Tensor

from pipeline.sparse.masks import Masks
from pipeline.sparse.select import count_true


def num_active(masks: Masks) -> int:
    """Number of active weights over all layers."""
    return sum(count_true(list(masks.values())))


def num_weights(masks: Masks) -> int:
    """Number of weights, active or not, over all layers."""
    return sum(mask.numel() for mask in masks.values())


def density(masks: Masks) -> float:
    """Active weights over all weights of the sparse layers."""
    return num_active(masks) / num_weights(masks)


def explore(ever_active: Masks, masks: Masks) -> dict[str, Tensor]:
    """The ever-active set after ``masks`` have been active too."""
    return {name: ever_active[name] | masks[name] for name in masks}


def r_s(ever_active: Masks) -> float:
    """|union of all masks so far| / N: starts at the density and never falls."""
    return density(ever_active)


def density_of_layers(masks: Masks) -> dict[str, float]:
    """The share of active weights in each layer; of the ever-active set, each layer's R_s. One host read."""
    counts = count_true(list(masks.values()))
    return {name: count / mask.numel() for (name, mask), count in zip(masks.items(), counts, strict=True)}

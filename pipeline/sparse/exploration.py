"""The ever-active set and R_s, the in-time over-parameterisation rate (ITOP, arXiv 2102.02887)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]


def num_active(masks: Masks) -> int:
    """Number of active weights over all layers."""
    return int(torch.stack([torch.count_nonzero(mask) for mask in masks.values()]).sum())  # one host read


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


def r_s_of_layers(ever_active: Masks) -> dict[str, float]:
    """R_s of each layer: the share of its weights that have been active."""
    shares = torch.stack([torch.count_nonzero(mask) / mask.numel() for mask in ever_active.values()]).tolist()
    return dict(zip(ever_active, shares, strict=True))

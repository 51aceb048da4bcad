"""One topology update: prune the weakest active weights, regrow as many. Pure functions of weights, masks and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.sparse.select import highest_k

Tensors = Mapping[str, Tensor]


def num_to_prune(drop_fraction: float, num_active: int) -> int:
    """ceil(p·n), as ITOP counts; a product that is an integer but for rounding is that integer."""
    return min(num_active, math.ceil(drop_fraction * num_active * (1 - 1e-12)))


def _prune(scores: Tensor, active: Tensor, k: int) -> Tensor:
    """``active`` [n] without its ``k`` lowest ``scores`` [n]; of equal scores the lower index is kept."""
    kept = int(active.sum()) - k
    return highest_k(scores.masked_fill(~active, -math.inf), kept) & active


def _grow(scores: Tensor, active: Tensor, k: int) -> Tensor:
    """``active`` [n] with the ``k`` highest ``scores`` [n] of the inactive positions added; of equal scores the lower index grows."""
    candidates = (~active).nonzero().squeeze(1)
    grown = active.clone()
    grown[candidates[highest_k(scores[candidates], k)]] = True
    return grown


def _protected(scores: Tensor, active: Tensor, min_active: int) -> Tensor:
    """The ``min_active`` highest-scored active positions of one layer."""
    return highest_k(scores.masked_fill(~active, -math.inf), min(min_active, int(active.sum()))) & active


def prune_and_regrow(
    masks: Tensors, prune_scores: Tensors, grow_scores: Tensors, *, drop_fraction: float, scope: str, min_active: int = 1
) -> dict[str, Tensor]:
    """New masks with as many active weights as before: per layer under ``layer`` scope, in total under ``global`` scope.

    Args:
        masks: bool tensors of the weights' shapes.
        prune_scores: flat scores per layer; the lowest active ones are pruned.
        grow_scores: flat scores per layer; the highest inactive ones grow, those just pruned included (RigL).
        drop_fraction: share p of the active weights to replace; ceil(p·n) of each layer, or of all together.
        scope: ``layer``, or ``global`` for one ranking over all layers.
        min_active: under ``global`` scope, the strongest weights of each layer that are never pruned.
    """
    if scope == "layer":
        return {
            name: _update_flat(mask.reshape(-1), prune_scores[name], grow_scores[name], drop_fraction).view(mask.shape)
            for name, mask in masks.items()
        }
    assert scope == "global", scope
    sizes = [mask.numel() for mask in masks.values()]
    active = torch.cat([mask.reshape(-1) for mask in masks.values()])
    protected = torch.cat([_protected(prune_scores[name], mask.reshape(-1), min_active) for name, mask in masks.items()])
    scores = torch.cat([prune_scores[name] for name in masks])
    k = min(num_to_prune(drop_fraction, int(active.sum())), int((active & ~protected).sum()))
    kept = _prune(scores, active & ~protected, k) | protected
    grown = _grow(torch.cat([grow_scores[name] for name in masks]), kept, k)
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), torch.split(grown, sizes), strict=True)}


def _update_flat(active: Tensor, prune_scores: Tensor, grow_scores: Tensor, drop_fraction: float) -> Tensor:
    k = num_to_prune(drop_fraction, int(active.sum()))
    return _grow(grow_scores, _prune(prune_scores, active, k), k)


def magnitude_masks(weights: Tensors, num_active: int | Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of the largest |w|: an int is one ranking over all layers, a mapping one count per layer. Ties keep the lower index."""
    flat = {name: weight.detach().reshape(-1).abs() for name, weight in weights.items()}
    if isinstance(num_active, int):
        chosen = torch.split(highest_k(torch.cat(list(flat.values())), num_active), [weight.numel() for weight in flat.values()])
        return {name: part.view(weights[name].shape) for name, part in zip(weights, chosen, strict=True)}
    return {name: highest_k(flat[name], num_active[name]).view(weights[name].shape) for name in weights}

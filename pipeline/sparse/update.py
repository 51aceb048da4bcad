"""One topology update: prune the weakest active weights, regrow as many. Pure functions of weights, masks and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.sparse.select import highest_k

Tensors = Mapping[str, Tensor]


def num_to_prune(drop_fraction: float, num_active: int) -> int:
    """ceil(p·n), as ITOP counts; a product that is an integer but for rounding is that integer."""
    return min(num_active, math.ceil(drop_fraction * num_active * (1 - 1e-12)))


def prune_and_regrow(
    masks: Tensors,
    weights: Tensors,
    grow_scores: Tensors,
    *,
    drop_fraction: float,
    scope: str,
    prune: Callable[[Tensor], Tensor] = torch.abs,
    min_active: int = 1,
) -> dict[str, Tensor]:
    """New masks with as many active weights as before: per layer under ``layer`` scope, in total under ``global`` scope.

    Args:
        masks: bool tensors of the weights' shapes.
        weights: of any memory format.
        grow_scores: flat scores per layer; the highest inactive ones grow, those just pruned included (RigL).
        drop_fraction: share p of the active weights to replace; ceil(p·n) of each layer, or of all together.
        scope: ``layer``, or ``global`` for one ranking over all layers.
        prune: scores of active weights [n_active]; the lowest are pruned. |w| by default.
        min_active: under ``global`` scope, the strongest weights of each layer that are never pruned.
    """
    assert scope in ("layer", "global"), scope
    active = {name: mask.reshape(-1).nonzero().squeeze(1) for name, mask in masks.items()}  # indices, ascending
    strength = {name: prune(weights[name].detach().reshape(-1)[active[name]]) for name in masks}
    if scope == "layer":
        flat = {name: _update(active[name], strength[name], grow_scores[name], drop_fraction) for name in masks}
        return {name: flat[name].view(mask.shape) for name, mask in masks.items()}
    sizes = [mask.numel() for mask in masks.values()]
    offsets = [sum(sizes[:layer]) for layer in range(len(sizes))]
    for name, scores in strength.items():
        strength[name] = scores.masked_fill(highest_k(scores, min(min_active, len(scores))), math.inf)
    new = _update(
        torch.cat([active[name] + offset for name, offset in zip(masks, offsets, strict=True)]),
        torch.cat(list(strength.values())),
        torch.cat([grow_scores[name] for name in masks]),
        drop_fraction,
    )
    return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), torch.split(new, sizes), strict=True)}


def _update(active: Tensor, strength: Tensor, grow_scores: Tensor, drop_fraction: float) -> Tensor:
    """One ranking. ``active`` [n_active] indices and their ``strength``, ``grow_scores`` [n] -> the new mask, bool [n]."""
    num_spared = int(torch.count_nonzero(strength == math.inf))
    k = min(num_to_prune(drop_fraction, len(active)), len(active) - num_spared)
    kept = active[highest_k(strength, len(active) - k)]
    lowest = -math.inf if grow_scores.is_floating_point() else torch.iinfo(grow_scores.dtype).min
    new = highest_k(grow_scores.index_fill(0, kept, lowest), k)
    new[kept] = True
    return new


def magnitude_masks(weights: Tensors, num_active: int | Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of the largest |w|: an int is one ranking over all layers, a mapping one count per layer. Ties keep the lower index."""
    flat = {name: weight.detach().reshape(-1).abs() for name, weight in weights.items()}
    if isinstance(num_active, int):
        chosen = torch.split(highest_k(torch.cat(list(flat.values())), num_active), [weight.numel() for weight in flat.values()])
        return {name: part.view(weights[name].shape) for name, part in zip(weights, chosen, strict=True)}
    return {name: highest_k(flat[name], num_active[name]).view(weights[name].shape) for name in weights}

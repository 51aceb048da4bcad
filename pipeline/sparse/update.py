"""One topology update: prune the weakest active weights, regrow as many.

Pure functions of weights, masks and scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.sparse.criteria import PRUNE
from pipeline.sparse.layers import NO_NORMS, NormShapes
from pipeline.sparse.request import Request
from pipeline.sparse.select import count_true, highest_k, highest_k_of, highest_per_row, positions, strongest_of_norms
from pipeline.sparse.strategy import SCOPES, Strategy
from pipeline.sparse.structure import Layout, first_of_units, mean_of_units

Tensors = Mapping[str, Tensor]
Parts = list[Tensor]  # one flat tensor per layer
Criterion = Callable[[Tensor], Tensor]


class GrowthStage(NamedTuple):
    """Growth by one criterion. The stages of an update follow one another; the last has share 1."""

    scores: Tensors  # flat, per layer; used up by growing
    share: float  # of what is still to grow


def share_of(share: float, number: int) -> int:
    """ceil(share·number), as ITOP counts; a product that is an integer but for rounding is that integer."""
    return min(number, math.ceil(share * number * (1 - 1e-12)))


def updated_masks(
    masks: Tensors,
    weights: Tensors,
    request: Request,
    growth: Sequence[GrowthStage],
    *,
    strategy: Strategy,
    num_active_before: int,
    without_gradient: Collection[str] = (),
    norm_shapes: NormShapes = NO_NORMS,
) -> dict[str, Tensor]:
    """Return the masks after an update: a density step down, pruning and regrowth, and a density step up.

    Args:
        masks: bool tensors of the weights' shapes.
        weights: of any memory format.
        request: what to do.
        growth: as in :func:`prune_and_regrow`; used up.
        strategy: the method.
        num_active_before: active weights in ``masks``.
        without_gradient: layers that had no gradient in this step, if a criterion reads it. They
            cannot be scored, so only a density step down changes their masks.
        norm_shapes: as in :func:`prune_and_regrow`.
    """
    new, target = dict(masks), request.num_active
    if target is not None and target < num_active_before:
        new = prune_to(new, weights, target, min_active=strategy.min_active, norm_shapes=norm_shapes)
    scored = {name: mask for name, mask in new.items() if name not in without_gradient}
    if growth and request.drop_fraction > 0 and scored:
        new |= prune_and_regrow(
            scored,
            weights,
            growth,
            drop_fraction=request.drop_fraction,
            scope=strategy.scope,
            prune=PRUNE[strategy.prune],
            min_active=strategy.min_active,
            structure=strategy.structure,
            norm_shapes=norm_shapes,
        )
    if target is not None and target > num_active_before and scored:
        scored = {name: new[name] for name in scored}
        num_fixed = sum(count_true([new[name] for name in without_gradient])) if without_gradient else 0
        room = sum(mask.numel() for mask in scored.values())
        new |= grow_to(
            scored, growth, min(room, target - num_fixed), is_normalised=strategy.scope == "global_normalised"
        )
    return new


def prune_and_regrow(
    masks: Tensors,
    weights: Tensors,
    growth: Sequence[GrowthStage],
    *,
    drop_fraction: float,
    scope: str = "layer",
    prune: Criterion | None = torch.abs,
    min_active: int = 1,
    structure: str = "none",
    norm_shapes: NormShapes = NO_NORMS,
) -> dict[str, Tensor]:
    """Return new masks with as many active weights as before.

    The number is kept per layer under ``layer`` and ``global_prune`` scope, and in total otherwise.

    Args:
        masks: bool tensors of the weights' shapes.
        weights: of any memory format.
        growth: the stages, in order. The highest inactive positions grow, those just pruned
            included (RigL). The scores are used up.
        drop_fraction: share p of the active weights to replace: ceil(p·n) of each layer, or of all together.
        scope: a row of ``strategy.SCOPES``.
        prune: scores of active weights [n_active]; the lowest are pruned. |w| by default; None
            prunes nothing, so nothing changes.
        min_active: the strongest weights of each layer that a ranking over all layers never prunes.
        structure: see ``strategy.parse_structure``. Rows regrow what they lost, so there is no
            ranking over all layers for growth.
        norm_shapes: of the layers under weight_norm, the shape of their norms. A norm of 0 is
            divided by, and new weights are 0, so the strongest weight of each norm is not pruned.
    """
    assert scope in SCOPES and (structure == "none" or scope in ("layer", "global_prune")), (scope, structure)
    if prune is None:
        return dict(masks)
    layouts = [Layout(tuple(mask.shape), structure) for mask in masks.values()]
    old = [layout.to_units(mask, first_of_units) for layout, mask in zip(layouts, masks.values(), strict=True)]
    counts = count_true(old)
    # indices of the active units within each layer; ``strengths`` and ``kept`` are indexed like these
    active = [positions(units, count) for units, count in zip(old, counts, strict=True)]
    strengths = [
        _strengths(weights[name].detach(), layout, indices, prune)
        for name, layout, indices in zip(masks, layouts, active, strict=True)
    ]
    spared = [
        strongest_of_norms(weights[name].detach().reshape(-1)[indices], indices, masks[name].shape, norm_shapes[name])
        if name in norm_shapes
        else None
        for name, indices in zip(masks, active, strict=True)
    ]
    if scope == "layer":
        kept = [
            highest_k(strength, count - share_of(drop_fraction, count))
            if mark is None
            else _keep_together([strength], count - share_of(drop_fraction, count), 0, [mark])[0]
            for strength, count, mark in zip(strengths, counts, spared, strict=True)
        ]
    else:
        strengths = [_normalised(strength) for strength in strengths] if scope == "global_normalised" else strengths
        kept = _keep_together(strengths, sum(counts) - share_of(drop_fraction, sum(counts)), min_active, spared)
    # indices, within each layer, of the units that cannot grow: those that are active already
    occupied = [
        indices[positions(mark, count)] for indices, mark, count in zip(active, kept, count_true(kept), strict=True)
    ]
    new = [torch.zeros_like(units).index_fill_(0, indices, True) for units, indices in zip(old, occupied, strict=True)]

    for scores, share in growth:
        # one score per unit of the layer, active or not
        parts = [layout.to_units(scores[name], mean_of_units) for layout, name in zip(layouts, masks, strict=True)]
        if scope == "global_normalised":
            parts = [_normalised(part) for part in parts]
        missing = [count - len(indices) for count, indices in zip(counts, occupied, strict=True)]
        parts = [_without(part, indices) for part, indices in zip(parts, occupied, strict=True)]
        if scope in ("global", "global_normalised"):
            grown = highest_k_of(parts, share_of(share, sum(missing)))
        elif layouts[0].row_size is None:
            grown = [highest_k(part, share_of(share, number)) for part, number in zip(parts, missing, strict=True)]
        else:
            grown = [_grow_rows(*layer, share=share) for layer in zip(parts, old, new, layouts, strict=True)]
        new = [units | mark for units, mark in zip(new, grown, strict=True)]
        if share < 1:
            occupied = [positions(units, count) for units, count in zip(new, count_true(new), strict=True)]
    return {name: layout.to_mask(units) for name, layout, units in zip(masks, layouts, new, strict=True)}


def prune_to(
    masks: Tensors, weights: Tensors, num_active: int, *, min_active: int = 1, norm_shapes: NormShapes = NO_NORMS
) -> dict[str, Tensor]:
    """Lower the density (GraNet): keep the ``num_active`` largest |w| of the active weights, ranked over all layers.

    The ``min_active`` largest of each layer are always kept, and the largest of each norm.
    """
    flat = {name: mask.reshape(-1) for name, mask in masks.items()}
    active = dict(zip(flat, map(positions, flat.values(), count_true(list(flat.values()))), strict=True))
    strengths = [weights[name].detach().reshape(-1)[indices].abs() for name, indices in active.items()]
    spared = [
        strongest_of_norms(strength, indices, masks[name].shape, norm_shapes[name]) if name in norm_shapes else None
        for (name, indices), strength in zip(active.items(), strengths, strict=True)
    ]
    kept = _keep_together(strengths, num_active, min_active, spared)
    new = {
        name: torch.zeros_like(flat[name]).index_fill_(0, indices[positions(mark, count)], True)
        for (name, indices), mark, count in zip(active.items(), kept, count_true(kept), strict=True)
    }
    return {name: new[name].view(mask.shape) for name, mask in masks.items()}


def grow_to(
    masks: Tensors, growth: Sequence[GrowthStage], num_active: int, *, is_normalised: bool = False
) -> dict[str, Tensor]:
    """Raise the density: ``masks`` and the highest scores elsewhere, always ranked over all layers.

    Args:
        masks: bool tensors of the weights' shapes.
        growth: the stages, in order. The scores are used up.
        num_active: active weights of all layers afterwards.
        is_normalised: whether the scores of each layer are divided by their mean first.
    """
    flat = [mask.reshape(-1) for mask in masks.values()]
    for scores, share in growth:
        counts = count_true(flat)
        parts = [scores[name] for name in masks]
        if is_normalised:
            parts = [_normalised(part) for part in parts]
        parts = [_without(part, positions(mask, count)) for part, mask, count in zip(parts, flat, counts, strict=True)]
        grown = highest_k_of(parts, share_of(share, num_active - sum(counts)))
        flat = [mask | mark for mask, mark in zip(flat, grown, strict=True)]
    return {name: new.view(mask.shape) for (name, mask), new in zip(masks.items(), flat, strict=True)}


def magnitude_masks(
    weights: Tensors, num_active: int | Mapping[str, int], *, norm_shapes: NormShapes = NO_NORMS
) -> dict[str, Tensor]:
    """Masks of the largest |w|: an int is one ranking over all layers, a mapping one count per layer.

    Ties keep the lower index. The largest weight of each norm of ``norm_shapes`` is kept.
    """
    flat = {name: weight.detach().reshape(-1).abs() for name, weight in weights.items()}
    for name in norm_shapes.keys() & flat.keys():
        every = torch.arange(flat[name].numel(), device=flat[name].device)
        spared = strongest_of_norms(flat[name], every, weights[name].shape, norm_shapes[name])
        flat[name] = flat[name].masked_fill(spared, math.inf)
    if isinstance(num_active, int):
        chosen = dict(zip(flat, highest_k_of(list(flat.values()), num_active), strict=True))
    else:
        chosen = {name: highest_k(flat[name], num_active[name]) for name in weights}
    return {name: chosen[name].view(weight.shape) for name, weight in weights.items()}


def _strengths(weight: Tensor, layout: Layout, active: Tensor, prune: Criterion) -> Tensor:
    """Prune scores of the active units."""
    if layout.unit_size > 1:
        return layout.to_units(prune(weight.reshape(-1)), mean_of_units)[active]
    return prune(layout.to_units(weight, mean_of_units)[active])


def _keep_together(strengths: Parts, k: int, min_active: int, spared: Sequence[Tensor | None]) -> Parts:
    """Mark the ``k`` strongest of all layers, with those ``spared`` and the ``min_active`` strongest of each layer."""
    least = [min(min_active, len(strength)) for strength in strengths]
    strongest = [highest_k(strength, number) for strength, number in zip(strengths, least, strict=True)]
    marks = [mark if also is None else mark | also for mark, also in zip(strongest, spared, strict=True)]
    numbers = zip(least, marks, spared, strict=True)
    num_spared = sum(number if also is None else count_true([mark])[0] for number, mark, also in numbers)
    return highest_k_of(
        [strength.masked_fill(mark, math.inf) for strength, mark in zip(strengths, marks, strict=True)],
        max(k, num_spared),
    )


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their mean; integers (keyed hashes) have the same distribution in every layer already."""
    if not scores.is_floating_point() or not len(scores):
        return scores
    mean = scores.mean(dtype=torch.float64).to(scores.dtype)
    return scores / torch.where(mean > 0, mean, 1)


def _without(scores: Tensor, indices: Tensor) -> Tensor:
    """Give ``scores`` the lowest value there is at ``indices``, in place."""
    lowest = -math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    return scores.index_fill_(0, indices, lowest)


def _grow_rows(scores: Tensor, old: Tensor, new: Tensor, layout: Layout, *, share: float) -> Tensor:
    """Mark the highest of each row, as many as ``share`` of what the row has lost."""
    shape = (-1, layout.row_size or 1)
    lost = old.view(shape).sum(1) - new.view(shape).sum(1)
    return highest_per_row(scores.view(shape), torch.ceil(share * (1 - 1e-12) * lost.double()).long()).view(-1)

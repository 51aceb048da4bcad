"""One topology update: prune the weakest active weights and regrow as many.

All functions are pure: they take weights, masks and scores, and return new masks. Tensors are given
by layer name; masks are bool tensors in the weights' shapes, and True marks an active weight.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.sparse.criteria import PRUNE, GrowthStage, prune_scores
from pipeline.sparse.layers import NO_NORMS, NormShapes
from pipeline.sparse.request import Request
from pipeline.sparse.select import (
    count_true,
    either,
    highest_k,
    highest_k_each,
    highest_k_of,
    highest_per_row,
    positions_each,
    spread,
    strongest_of_norms,
    taken_by,
    without,
)
from pipeline.sparse.strategy import SCOPES, Strategy
from pipeline.sparse.structure import Layout, fan_ins_after_ablation, first_of_units, mean_of_units

Tensors = Mapping[str, Tensor]
Parts = list[Tensor]  # one flat tensor per layer
Criterion = Callable[[Tensor], Tensor]
NO_FAN_INS: Tensors = MappingProxyType({})


class Updated(NamedTuple):
    """The result of a topology update."""

    masks: dict[str, Tensor]
    # active before and after the update but pruned in between, and to start at 0: bool, in the weights' shapes;
    # empty where regrown weights keep their values
    restarted: dict[str, Tensor]


def share_of(share: float, number: int) -> int:
    """Return ceil(share·number), as ITOP counts (arXiv 2102.02887).

    A product that differs from an integer only by rounding counts as that integer.
    """
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
    output_layer: str | None = None,
) -> Updated:
    """Return the masks after an update: a lower density, then pruning and regrowth, then a higher density.

    Which weights restart, ``strategy.regrown`` says (a key of ``strategy.REGROWN``).

    Args:
        masks: masks before the update.
        weights: weights in any memory format.
        request: what the update does.
        growth: stages of growth, as for :func:`prune_and_regrow`; the scores are overwritten.
        strategy: the method.
        num_active_before: number of active weights in ``masks``.
        without_gradient: layers that had no gradient in this step, if a grow criterion reads it.
            They have no scores, so that only a lower density changes their masks.
        norm_shapes: as for :func:`prune_and_regrow`.
        output_layer: the layer whose outputs never die, whatever ``strategy.min_salient`` says.
    """
    new, target = dict(masks), request.num_active
    if target is not None and target < num_active_before:
        new = prune_to(new, weights, target, min_active=strategy.min_active, norm_shapes=norm_shapes)
    never_pruned = dict(new)
    scored = {name: mask for name, mask in new.items() if name not in without_gradient}
    if growth and request.drop_fraction > 0 and scored:
        replace = functools.partial(
            prune_and_regrow,
            scored,
            weights,
            drop_fraction=request.drop_fraction,
            scope=strategy.scope,
            prune=PRUNE[strategy.prune],
            min_active=strategy.min_active,
            norm_shapes=norm_shapes,
        )
        if strategy.min_salient:
            # salient are the weights that the update would leave active without a structure
            copies = [GrowthStage({name: scores[name].clone() for name in scored}, share) for scores, share in growth]
            salient = {name: mask for name, mask in replace(growth=copies).items() if name != output_layer}
            counts = count_true(list(salient.values()))
            fan_ins = map(fan_ins_after_ablation, salient.values(), counts, itertools.repeat(strategy.min_salient))
            replace = functools.partial(replace, fan_ins=dict(zip(salient, fan_ins, strict=True)))
        replace = functools.partial(replace, structure=strategy.structure)
        new |= replace(growth=growth)
        if strategy.regrown == "zero":
            never_pruned |= replace(growth=())
    if target is not None and target > num_active_before and scored:
        scored = {name: new[name] for name in scored}
        num_fixed = sum(count_true([new[name] for name in without_gradient])) if without_gradient else 0
        room = sum(mask.numel() for mask in scored.values())
        new |= grow_to(
            scored, growth, min(room, target - num_fixed), is_normalised=strategy.scope == "global_normalised"
        )
    if strategy.regrown == "kept":
        return Updated(new, {})
    return Updated(new, {name: mask & new[name] & ~never_pruned[name] for name, mask in masks.items()})


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
    fan_ins: Tensors = NO_FAN_INS,
) -> dict[str, Tensor]:
    """Return new masks with as many active weights as before.

    Each layer keeps its number of active weights under the scopes ``layer`` and ``global_prune``;
    under the others only the total is kept, and under ``reallocated`` layers change as :func:`reallocated` says.

    Args:
        masks: masks before the update.
        weights: weights in any memory format.
        growth: stages of growth, in order. The inactive positions with the highest scores grow,
            including those that were just pruned (RigL, arXiv 1911.11134). The scores are
            overwritten. Without a stage nothing grows: the masks are those after pruning.
        drop_fraction: share p of the active weights to replace, in [0, 1]: ceil(p·n) of each layer, or of all layers.
        scope: a key of ``strategy.SCOPES``.
        prune: gives the active weights [n_active] their scores; the lowest are pruned. |w| by
            default; with None nothing is pruned, so nothing changes.
        min_active: number of the strongest weights of each layer that a ranking over all layers never prunes.
        structure: see ``strategy.parse_structure``. Any but ``none`` needs a scope that does not rank
            growth over all layers; with n:m structure each row regrows as many weights as it lost.
        norm_shapes: shape of the norms of each layer under weight_norm, by name. The strongest
            weight of each norm is never pruned: new weights are 0, and a norm of 0 would be a
            division by 0.
        fan_ins: only with structure ``fan_in``: the number of active weights of each output
            after the update, int64 [outputs], for the layers where it changes. Weights of outputs
            that get none are pruned first, then the weakest of the layer, then the weakest of an
            output that has too many.
    """
    assert scope in SCOPES and (structure == "none" or scope in ("layer", "global_prune")), (scope, structure)
    if prune is None:
        return dict(masks)
    layouts = [Layout(tuple(mask.shape), structure) for mask in masks.values()]
    old = [layout.to_units(mask, first_of_units) for layout, mask in zip(layouts, masks.values(), strict=True)]
    counts = count_true(old)
    # indices of the active units within each layer; ``strengths`` and ``kept`` are indexed like these
    active = positions_each(old, counts)
    strengths = _strengths([weights[name].detach() for name in masks], layouts, active, prune)
    spared = [
        strongest_of_norms(weights[name].detach().reshape(-1)[indices], indices, masks[name].shape, norm_shapes[name])
        if name in norm_shapes
        else None
        for name, indices in zip(masks, active, strict=True)
    ]
    if scope == "layer":
        numbers = [count - share_of(drop_fraction, count) for count in counts]
        kept = [
            mark if also is None else _keep_together([strength], number, 0, [also])[0]
            for strength, number, mark, also in zip(
                strengths, numbers, highest_k_each(strengths, numbers), spared, strict=True
            )
        ]
    else:
        strengths = [_normalised(strength) for strength in strengths] if scope == "global_normalised" else strengths
        kept = _keep_together(strengths, sum(counts) - share_of(drop_fraction, sum(counts)), min_active, spared)
    if fan_ins:
        kept = [
            _keep_within(fan_ins[name], indices, layout, strength, mark) if name in fan_ins else mark
            for name, layout, indices, strength, mark in zip(masks, layouts, active, strengths, kept, strict=True)
        ]
    num_now = count_true(kept)
    if scope == "reallocated":
        counts = reallocated(num_now, [len(units) for units in old], sum(counts))
    # ``taken`` are the units that cannot grow: those that are active already
    new, taken = spread(kept, active, num_now, [len(units) for units in old])

    for scores, share in growth:
        # one score per unit of the layer, active or not
        parts = [layout.to_units(scores[name], mean_of_units) for layout, name in zip(layouts, masks, strict=True)]
        if scope == "global_normalised":
            parts = [_normalised(part) for part in parts]
        missing = [count - now for count, now in zip(counts, num_now, strict=True)]
        parts = without(parts, taken)
        if scope in ("global", "global_normalised"):
            grown = highest_k_of(parts, share_of(share, sum(missing)))
        elif layouts[0].row_size is None:
            grown = highest_k_each(parts, [share_of(share, number) for number in missing])
        else:
            grown = [
                _grow_rows(part, units, layout, fan_ins.get(name, _active_per_row(before, layout)), share=share)
                for name, part, before, units, layout in zip(masks, parts, old, new, layouts, strict=True)
            ]
        new = either(new, grown)
        if share < 1:
            num_now = count_true(new)
            taken = taken_by(new, num_now)
    return {name: layout.to_mask(units) for name, layout, units in zip(masks, layouts, new, strict=True)}


def reallocated(kept: Sequence[int], sizes: Sequence[int], total: int) -> list[int]:
    """Return how many weights each layer has after growth: ``total`` in all, new ones in proportion to ``kept``.

    DSR (arXiv 1902.05967) gives layer l the share kept_l / Σ kept of what grows. Shares are rounded by largest
    remainder, of equal ones the earlier layer first; what does not fit into a layer goes to the others in proportion.

    Example:
        Of kept weights 6 and 3, in layers with 8 and 20 positions, and 5 to grow, the first gets 3.33 and the second
        1.67, so 3 and 2; the first has room for 2, so that the last one goes to the second: 8 and 6.
    """
    counts = list(kept)
    while missing := total - sum(counts):
        open_layers = [i for i, size in enumerate(sizes) if counts[i] < size]
        shares = {i: max(kept[i], 0 if any(kept[j] for j in open_layers) else 1) for i in open_layers}
        whole = sum(shares.values())
        exact = {i: missing * share / whole for i, share in shares.items()}
        grown = {i: math.floor(number) for i, number in exact.items()}
        for i in sorted(grown, key=lambda i: grown[i] - exact[i])[: missing - sum(grown.values())]:
            grown[i] += 1
        for i, number in grown.items():
            counts[i] = min(sizes[i], counts[i] + number)
    return counts


def prune_to(
    masks: Tensors,
    weights: Tensors,
    num_active: int,
    *,
    min_active: int = 1,
    norm_shapes: NormShapes = NO_NORMS,
    strength: Criterion = torch.abs,
) -> dict[str, Tensor]:
    """Return masks with a lower density (GraNet, arXiv 2106.10404).

    The ``num_active`` active weights with the largest ``strength``, |w| by default, over all layers stay
    active, and always the ``min_active`` strongest of each layer and the strongest of each norm of ``norm_shapes``.
    """
    flat = {name: mask.reshape(-1) for name, mask in masks.items()}
    marks = list(flat.values())
    active = dict(zip(flat, positions_each(marks, count_true(marks)), strict=True))
    strengths = [strength(weights[name].detach().reshape(-1)[indices]) for name, indices in active.items()]
    spared = [
        strongest_of_norms(found, indices, masks[name].shape, norm_shapes[name]) if name in norm_shapes else None
        for (name, indices), found in zip(active.items(), strengths, strict=True)
    ]
    kept = _keep_together(strengths, num_active, min_active, spared)
    new, _ = spread(kept, list(active.values()), count_true(kept), [len(mark) for mark in marks])
    return {name: mark.view(mask.shape) for (name, mask), mark in zip(masks.items(), new, strict=True)}


def grow_to(
    masks: Tensors, growth: Sequence[GrowthStage], num_active: int, *, is_normalised: bool = False
) -> dict[str, Tensor]:
    """Return masks with a higher density: the inactive positions with the highest scores over all layers are added.

    Args:
        masks: masks before the update.
        growth: stages of growth, in order. The scores are overwritten.
        num_active: number of active weights of all layers afterwards.
        is_normalised: whether to divide the scores of each layer by their mean first.
    """
    flat = [mask.reshape(-1) for mask in masks.values()]
    for scores, share in growth:
        counts = count_true(flat)
        parts = [scores[name] for name in masks]
        if is_normalised:
            parts = [_normalised(part) for part in parts]
        parts = without(parts, taken_by(flat, counts))
        grown = highest_k_of(parts, share_of(share, num_active - sum(counts)))
        flat = either(flat, grown)
    return {name: new.view(mask.shape) for (name, mask), new in zip(masks.items(), flat, strict=True)}


def magnitude_masks(
    weights: Tensors, num_active: int | Mapping[str, int], *, norm_shapes: NormShapes = NO_NORMS
) -> dict[str, Tensor]:
    """Return the masks of the weights with the largest |w|; of equal weights the lower index is active.

    Args:
        weights: weights in any memory format.
        num_active: number of active weights, of all layers in one ranking (int) or of each layer (mapping).
        norm_shapes: as for :func:`prune_and_regrow`; the largest weight of each norm is active.
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


def _strengths(
    weights: Sequence[Tensor], layouts: Sequence[Layout], active: Sequence[Tensor], prune: Criterion
) -> list[Tensor]:
    """Return the prune scores of the active units of each layer."""
    layers = list(zip(weights, layouts, active, strict=True))
    if any(layout.unit_size > 1 for layout in layouts):
        return [layout.to_units(prune(w.reshape(-1)), mean_of_units)[indices] for w, layout, indices in layers]
    return prune_scores(prune, [layout.to_units(w, mean_of_units)[indices] for w, layout, indices in layers])


def _keep_together(strengths: Parts, k: int, min_active: int, spared: Sequence[Tensor | None]) -> Parts:
    """Mark the ``k`` strongest of all layers, including ``spared`` and the ``min_active`` strongest of each layer."""
    least = [min(min_active, len(strength)) for strength in strengths]
    strongest = highest_k_each(strengths, least)
    marks = [mark if also is None else mark | also for mark, also in zip(strongest, spared, strict=True)]
    numbers = zip(least, marks, spared, strict=True)
    num_spared = sum(number if also is None else count_true([mark])[0] for number, mark, also in numbers)
    return highest_k_of(
        [strength.masked_fill(mark, math.inf) for strength, mark in zip(strengths, marks, strict=True)],
        max(k, num_spared),
    )


def _keep_within(fan_in: Tensor, active: Tensor, layout: Layout, strengths: Tensor, kept: Tensor) -> Tensor:
    """Mark as many active units as ``kept`` does, but none of an output without fan-in, and at most it of any other.

    The strongest are marked, or all that there are. ``active`` are their indices; ``strengths`` and
    ``kept`` are indexed like these.
    """
    size = layout.row_size or 1
    can_stay = fan_in[active // size] > 0
    kept = highest_k(strengths.masked_fill(~can_stay, -math.inf), count_true([kept])[0]) & can_stay
    of_rows = strengths.new_full((layout.num_units,), -math.inf)
    of_rows[active] = strengths.masked_fill(~kept, -math.inf)
    return kept & highest_per_row(of_rows.view(-1, size), fan_in).view(-1)[active]


def _normalised(scores: Tensor) -> Tensor:
    """Return the scores divided by their mean; integers (keyed hashes) have the same distribution in every layer."""
    if not scores.is_floating_point() or not len(scores):
        return scores
    mean = scores.mean(dtype=torch.float64).to(scores.dtype)
    return scores / torch.where(mean > 0, mean, 1)


def _active_per_row(units: Tensor, layout: Layout) -> Tensor:
    return units.view(-1, layout.row_size or 1).sum(1)


def _grow_rows(scores: Tensor, new: Tensor, layout: Layout, wanted: Tensor, *, share: float) -> Tensor:
    """Mark the highest scores of each row, as many as ``share`` of the units that it lacks of ``wanted`` [rows]."""
    lacking = wanted - _active_per_row(new, layout)
    quotas = torch.ceil(share * (1 - 1e-12) * lacking.double()).long()
    return highest_per_row(scores.view(-1, layout.row_size or 1), quotas).view(-1)

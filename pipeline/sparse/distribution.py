"""Distribute a density over layers: uniform, Erdős–Rényi (ER), Erdős–Rényi-kernel (ERK), with exact counts.

ERK is defined in RigL, arXiv 1911.11134.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.sparse.layers import NO_NORMS, Form, NormShapes
from pipeline.sparse.select import key_of, keyed_hash, strongest_of_norms
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.structure import Layout, structured_masks

Shapes = Mapping[str, tuple[int, ...]]
_HIGHEST = torch.iinfo(torch.int32).max  # of keyed hashes


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density in every layer."""
    return dict.fromkeys(shapes, density)


def _proportional(shapes: Shapes, density: float, raw: Mapping[str, float]) -> dict[str, float]:
    """Densities eps·raw, with eps such that the total is ``density``; layers that would exceed 1 are dense."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        wanted = sum(density * sizes[name] for name in shapes if name not in dense) - sum(
            (1 - density) * sizes[name] for name in dense
        )
        epsilon = wanted / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        largest = max(raw[name] for name in shapes if name not in dense)
        if epsilon * largest <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= {name for name in shapes if raw[name] == largest}
    return dict.fromkeys(shapes, 1.0)


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Densities proportional to (out + in) / (out·in) (SET)."""
    return _proportional(shapes, density, {name: (s[0] + s[1]) / (s[0] * s[1]) for name, s in shapes.items()})


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Densities proportional to (out + in + kh + kw) / (out·in·kh·kw) (RigL)."""
    return _proportional(shapes, density, {name: sum(s) / math.prod(s) for name, s in shapes.items()})


def uniform_dense_first(shapes: Shapes, density: float) -> dict[str, float]:
    """Keep the first layer dense and give all others the same density, such that the total is ``density`` (RigL)."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first, *others = shapes
    rest = sum(sizes[name] for name in others)
    share = (density * (sizes[first] + rest) - sizes[first]) / rest if rest else 0.0
    if share <= 0:  # the first layer alone is more than the budget
        return uniform(shapes, density)
    return {first: 1.0, **dict.fromkeys(others, share)}


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "uniform_dense_first": uniform_dense_first,
    "er": er,
    "erk": erk,
}


def densities_of(forms: Mapping[str, Form], distribution: str, density: float) -> dict[str, float]:
    """The density of each layer by a row of ``DISTRIBUTIONS``. Each of stacked experts is a layer of its own there.

    A layer under weight_norm that would have fewer weights than norms gets one for each, and the
    others share what is left; where that is nothing, none gets more.
    """
    sizes = {name: math.prod(form.shape) * form.copies for name, form in forms.items()}
    least = {name: math.prod(form.norm_shape) for name, form in forms.items() if form.norm_shape is not None}
    raised: dict[str, float] = {}
    while True:
        rest = {name: form for name, form in forms.items() if name not in raised}
        left = density * sum(sizes.values()) - sum(least[name] for name in raised)
        if raised and (not rest or left <= 0):
            return _by_copy(forms, distribution, density)
        found = _by_copy(rest, distribution, left / sum(sizes[name] for name in rest) if raised else density)
        low = [name for name in rest if name in least and found[name] * sizes[name] < least[name]]
        raised |= {name: least[name] / sizes[name] for name in low}
        if not low:
            return {name: raised[name] if name in raised else found[name] for name in forms}


def _by_copy(forms: Mapping[str, Form], distribution: str, density: float) -> dict[str, float]:
    copies = {name: [f"{name} {copy}".removesuffix(" 0") for copy in range(of.copies)] for name, of in forms.items()}
    shapes = {copy: forms[name].shape for name in forms for copy in copies[name]}
    densities = DISTRIBUTIONS[distribution](shapes, density)
    return {name: sum(densities[copy] for copy in copies[name]) / len(copies[name]) for name in forms}


def exact_counts(shapes: Shapes, densities: Mapping[str, float], density: float) -> dict[str, int]:
    """Active weights per layer, apportioned by largest remainder so that they add up to round(density·N) exactly.

    Where the apportioning cuts through equal remainders, the earlier layer gets the extra weight.
    """
    assert 0 < density <= 1, density
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    exact = {name: densities[name] * sizes[name] for name in shapes}
    counts = {name: min(sizes[name], math.floor(exact[name])) for name in shapes}
    order = sorted(shapes, key=lambda name: counts[name] - exact[name])  # stable: earlier layers first among equals
    while (missing := total - sum(counts.values())) > 0:
        open_layers = [name for name in order if counts[name] < sizes[name]]
        for name in open_layers[:missing]:
            counts[name] += 1
    for name in reversed(order):  # rounding in ``densities`` can overshoot by a weight
        if sum(counts.values()) > total and counts[name] > 0:
            counts[name] -= 1
    return counts


def structured_counts(
    counts: Mapping[str, int], shapes: Shapes, forms: Mapping[str, Form], structure: str
) -> dict[str, int]:
    """The numbers of active weights nearest to ``counts`` that ``structure`` allows.

    Args:
        counts: active weights per layer.
        shapes: of the weights.
        forms: of the weights.
        structure: see ``strategy.parse_structure``.

    Raises:
        ConfigError: for layers that cannot have the structure.
    """
    if structure == "none":
        return dict(counts)
    layouts = {name: Layout(shapes[name], structure) for name in counts}
    reasons = {name: forms[name].unstructured or layout.unsupported_reason() for name, layout in layouts.items()}
    if unfit := {name: reason for name, reason in reasons.items() if reason}:
        name = next(iter(unfit))
        raise ConfigError(
            f"structure: {structure!r} does not fit {name}: {unfit[name]}",
            do=f"keep these layers dense: dense_layers: [{', '.join(unfit)}]",
        )
    return {name: layout.num_active(counts[name]) * layout.unit_size for name, layout in layouts.items()}


def random_masks(
    shapes: Shapes,
    counts: Mapping[str, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    structure: str = "none",
    norm_shapes: NormShapes = NO_NORMS,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks with exactly ``counts`` active weights, at the positions of the smallest keyed hashes of (seed, layer).

    With ``weights`` they are at the positions of those with the largest magnitudes instead. With a
    ``structure`` the counts are rounded to what it allows (``structure.Layout.num_active``).
    Of each norm of ``norm_shapes``, the position with the smallest hash is among them.
    """
    masks = {}
    for layer, (name, shape) in enumerate(shapes.items()):
        layout = Layout(shape, structure)
        if weights is None:
            scores, lowest = keyed_hash(key_of(seed, 0, layer), math.prod(shape), device=device).neg_(), -_HIGHEST
        else:
            scores, lowest = weights[name].detach().reshape(-1).abs().float(), 0
        if name in norm_shapes:
            every = torch.arange(len(scores), device=scores.device)
            first = strongest_of_norms(scores - lowest, every, shape, norm_shapes[name])  # 0 and more
            scores.masked_fill_(first, _HIGHEST)
        masks[name] = structured_masks(scores, layout, layout.num_active(counts[name]))
    return masks


def initial_masks(
    weights: Mapping[str, Tensor],
    forms: Mapping[str, Form],
    strategy: Strategy,
    density: float,
    *,
    seed: int,
    by_magnitude: bool = False,
) -> dict[str, Tensor]:
    """The masks that ``strategy`` starts with, on the device of the weights.

    Args:
        weights: by name.
        forms: of each of them.
        strategy: the method.
        density: over all layers.
        seed: keys the positions.
        by_magnitude: take the positions of the largest weights of each layer instead.

    Raises:
        ConfigError: for a layer that cannot have the structure, or would have no weight.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    forms = {name: forms[name] for name in weights}
    counts = exact_counts(shapes, densities_of(forms, strategy.distribution, density), density)
    counts = structured_counts(counts, shapes, forms, strategy.structure)
    if dead := [name for name, count in counts.items() if count == 0]:
        raise ConfigError(
            f"density: {density:g} leaves no weight in {', '.join(dead)}",
            do="raise the density, or keep these layers dense",
        )
    norm_shapes = {name: form.norm_shape for name, form in forms.items() if form.norm_shape is not None}
    for name, norm_shape in norm_shapes.items():
        if counts[name] < (num_norms := math.prod(norm_shape)):
            raise ConfigError(
                f"density: {density:g} leaves {counts[name]} weights in {name}, but weight_norm needs one for "
                f"each of its {num_norms} norms",
                do="raise the density, or keep this layer dense",
            )
    device = next(iter(weights.values())).device
    return random_masks(
        shapes,
        counts,
        seed=seed,
        device=device,
        structure=strategy.structure,
        norm_shapes=norm_shapes,
        weights=weights if by_magnitude else None,
    )


def check_masks(masks: Mapping[str, Tensor], shapes: Shapes, structure: str) -> None:
    """Check that given masks are those of weights of these shapes, and have the structure.

    Raises:
        ConfigError: a mask is missing, does not belong to a weight, has another shape or breaks the structure.
    """
    for name in dict.fromkeys([*shapes, *masks]):
        if name not in masks:
            raise ConfigError(f"masks: {name} has none", do="keep this layer dense (dense_layers), or give it a mask")
        mask = masks[name]
        if name not in shapes:
            raise ConfigError(f"masks: {name} is not a sparse weight of the model", do="do not keep this layer dense")
        if tuple(mask.shape) != shapes[name] or mask.dtype != torch.bool:
            found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise ConfigError(f"masks: {name}: expected bool {list(shapes[name])}, got {found}", do="pass its own mask")
        if not (num_active := int(mask.count_nonzero())):
            raise ConfigError(f"masks: {name} has no active weight", do="keep at least one")
        if structure == "none":
            continue
        layout = Layout(shapes[name], structure)
        num_units = num_active // layout.unit_size
        if layout.unsupported_reason() or not torch.equal(structured_masks(mask.float(), layout, num_units), mask):
            raise ConfigError(f"masks: {name} does not have the structure {structure!r}", do="use structure 'none'")

"""What a Sparsifier refuses: strategies, models and saved states that cannot be meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import GROW, PRUNE
from pipeline.sparse.distribution import DISTRIBUTIONS
from pipeline.sparse.layers import plain_name
from pipeline.sparse.strategy import Strategy, contradictions

POSTPONED = "postponed "  # begins the numbers that tell of an update still to be made; other states have none


def require_sense(strategy: Strategy, density: float) -> None:
    """Raise ConfigError for a strategy that names what there is not, or contradicts itself or the density."""
    if not 0 < density <= 1:
        raise ConfigError(f"sparsity.density: {density} is not in (0, 1]", do="choose one, 0.1 for instance")
    tables: dict[str, Mapping[str, Any]] = {
        "grow": GROW,
        "grow_rest": GROW,
        "prune": PRUNE,
        "distribution": DISTRIBUTIONS,
    }
    for field, table in tables.items():
        if (value := getattr(strategy, field)) is not None and value not in table:
            raise ConfigError(
                f"sparsity.{field}: {value!r} is none of {', '.join(table)}",
                do="correct it, or add a row to that table",
            )
    for problem in contradictions(strategy, density):
        raise ConfigError(f"sparsity.{problem}", do="change one of the two")


def require_fit(
    weights: Mapping[str, nn.Parameter],
    shadows: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Raise ConfigError unless the sparse weights, the shadows and the optimiser (None: it steps on copies) go together."""
    if not weights:
        raise ConfigError(
            "sparsity.dense_layers: no convolution, linear or attention weight of the model is left sparse",
            do="name fewer layers, or give a model with such weights, not parametrised, that require a gradient",
        )
    device = next(iter(weights.values())).device
    stepped = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if optimizer is not None
        else None
    )
    for name, weight in weights.items():
        if isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
            raise ConfigError(f"{name}: this weight has no values yet", do="initialise the model first")
        if weight.device != device:
            raise ConfigError(
                f"{name}: this weight is on {weight.device}, others on {device}",
                do="give each rank a model on one device",
            )
        if stepped is not None and id(weight) not in stepped:
            raise ConfigError(
                f"{name}: this weight is not the optimiser's",
                do="make the optimiser from the parameters of this very model",
            )
        for shadow in shadows:
            if plain_name(name) not in shadow:
                raise ConfigError(
                    f"{name}: this weight is not in a shadow", do="give shadows that are copies of the model"
                )
            if shadow[plain_name(name)].device != device:
                raise ConfigError(
                    f"{name}: this weight is on {device}, in a shadow it is not", do="put both on one device"
                )


def misfit(saved: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> str:
    """Why ``saved`` cannot be the state of the one whose present state is ``own``, both as ``Sparsifier.state_dict``; empty if it can."""
    numbers, present = saved["numbers"], own["numbers"]
    if numbers.get("seed", present["seed"]) != present["seed"]:
        return f"its masks were drawn with seed {numbers['seed']}, not {present['seed']}"
    if not all(set(saved[kind]) == set(own["masks"]) for kind in ("masks", "ever_active")):
        return "its masks are for other layers than this model's"
    if set(saved["tensors"]) != set(own["tensors"]) or not {n for n in present if not n.startswith(POSTPONED)} <= set(
        numbers
    ):
        return "it was made by another method"
    for kind in ("masks", "ever_active", "tensors"):
        for name, tensor in own[kind].items():
            if (shape := tuple(saved[kind][name].shape)) != tuple(tensor.shape):
                return f"{name} is of shape {shape}, not {tuple(tensor.shape)}"
    return ""

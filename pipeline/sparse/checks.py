"""Check strategy, model and optimiser of a Sparsifier. Errors name the arguments of the Sparsifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import GROW, PRUNE
from pipeline.sparse.distribution import DISTRIBUTIONS
from pipeline.sparse.initial import INITIAL_SCORES
from pipeline.sparse.layers import plain_name
from pipeline.sparse.optimizers import check_optimizer
from pipeline.sparse.strategy import DENSITY_SCHEDULES, REGROWN, SCOPES, Strategy, contradictions


def check_strategy(strategy: Strategy, density: float) -> None:
    """Check that the strategy names rows of the tables, and contradicts neither itself nor the density.

    Raises:
        ConfigError: naming the argument or the strategy's field.
    """
    if not 0 < density <= 1:
        raise ConfigError(
            f"density: {density} is not in (0, 1]", do="choose a number above 0 and at most 1, such as 0.1"
        )
    tables: dict[str, Mapping[str, Any]] = {
        "grow": GROW,
        "grow_rest": GROW,
        "prune": PRUNE,
        "distribution": DISTRIBUTIONS,
        "regrown": REGROWN,
        "initial": INITIAL_SCORES,
        "scope": SCOPES,
        "density_schedule": DENSITY_SCHEDULES,
    }
    for field, table in tables.items():
        if (value := getattr(strategy, field)) is not None and value not in table:
            raise ConfigError(
                f"{field}: {value!r} is not one of {', '.join(table)}",
                do="correct the strategy, or add a row to that table",
            )
    for problem in contradictions(strategy, density):
        raise ConfigError(problem, do="change one of the two")


def check_model(
    weights: Mapping[str, nn.Parameter],
    shadows: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Check that the sparse weights, the shadows and the optimiser (None: it steps on copies) go together.

    Raises:
        ConfigError: naming the first weight that does not.
    """
    if not weights:
        raise ConfigError(
            "dense_layers: no weight of the model that can be sparse is left",
            do="name fewer layers, or pass a model with convolution or linear layers that require a gradient",
        )
    if optimizer is not None:
        check_optimizer(optimizer)
    device = next(iter(weights.values())).device
    stepped = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if optimizer is not None
        else None
    )
    for name, weight in weights.items():
        if isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
            raise ConfigError(f"{name} has no values yet", do="initialise the model first")
        if weight.device != device:
            raise ConfigError(
                f"{name} is on {weight.device}, other weights are on {device}",
                do="put the model of each rank on one device",
            )
        if stepped is not None and id(weight) not in stepped:
            raise ConfigError(
                f"{name} is not in the optimiser",
                do="build the optimiser from this model's parameters",
            )
        for shadow in shadows:
            if plain_name(name) not in shadow:
                raise ConfigError(
                    f"shadows: {name} is missing from one of the models",
                    do="pass copies of the model, such as moving averages",
                )
            if shadow[plain_name(name)].device != device:
                raise ConfigError(
                    f"shadows: {name} is on {device} in the model, but on another device in one of the shadows",
                    do="put both on one device",
                )

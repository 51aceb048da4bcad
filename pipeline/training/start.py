"""What a run starts from beside its seed: a ticket (``model.from_ticket``) or a state_dict (``model.from_state``)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.config.schema import Config, ModelConfig, strategy_of
from pipeline.data.loaders import TrainLoader
from pipeline.engine.torch_engine import micro_batches_per_rank, place_model
from pipeline.errors import ConfigError, DataError
from pipeline.sparse.distribution import random_masks
from pipeline.sparse.exploration import num_active, num_weights
from pipeline.sparse.initial import masks_at_start
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets.place import read_ticket
from pipeline.tickets.state_dict import read_state
from pipeline.tickets.verify import VALUES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Start:
    """Weights and masks to start from, and where they come from."""

    state: Mapping[str, Tensor] = field(default_factory=dict)  # empty: the network's own initial weights
    masks: Mapping[str, Tensor] | Literal["random", "magnitude"] = "random"
    origin: Mapping[str, Any] = field(default_factory=dict)  # for the provenance of tickets

    def load(self, model: nn.Module) -> None:
        """Give ``model``, which has been initialised, the weights to start from; a new head keeps its own."""
        if self.state:
            model.load_state_dict({**model.state_dict(), **self.state})


FROM_SEED = Start()


def read_start(config: Config) -> Start:
    """Read what the run starts from, and check that it fits the configured network.

    Raises:
        ConfigError: the ticket's masks or density do not fit the configuration, or the number of
            classes differs and ``model.new_head`` is not set.
        DataError: the file does not exist or holds tensors of another network.
        IntegrityError: the ticket is damaged.
    """
    of = config.model
    if not of.from_ticket and not of.from_state:
        return FROM_SEED
    origin: dict[str, Any]
    if of.from_ticket:
        ticket = read_ticket(of.from_ticket)
        made = ticket.provenance
        file, whose = dict(ticket.state), f"model.from_ticket: {of.from_ticket} ({made.model})"
        origin = {
            "from": "ticket",
            "sha256": ticket.content_digest,
            "name": f"ticket {made.index} of {made.parent_run}",
        }
        masks = ticket.masks if config.sparsity.method != "dense" else {}
    else:
        found = read_state(Path(of.from_state))
        file, whose, masks = found.tensors, f"model.from_state: {of.from_state}", {}
        if any(name.startswith(VALUES) for name in file):
            raise ConfigError(f"{whose}: is a ticket", do=f"set model.from_ticket={of.from_state} instead")
        origin = {"from": "state", "sha256": found.sha256, "name": Path(of.from_state).name}
    outline = models.outline(of.name, num_classes=of.num_classes, args=of.args)
    head = _head(of, outline) if of.new_head else set[str]()
    _check_tensors(file, outline, of, head=head, whose=whose)
    _check_finite(file, whose)
    state = {name: tensor for name, tensor in file.items() if name not in head}
    if masks:
        masks = _checked_masks(masks, outline, config, head, whose=whose)
    if head:
        origin["new_head"] = sorted(head)
    if masks:
        return Start(state, masks, origin)
    return Start(state, "magnitude" if of.from_state else "random", origin)


def choose_masks(start: Start, model: nn.Module, config: Config, loader: TrainLoader) -> Start:
    """Return ``start`` with the masks that a method such as SNIP chooses by the first batch; others change nothing.

    A resumed run chooses them too, and then has those of its checkpoint. Every rank must call this.
    """
    strategy = strategy_of(config.sparsity)
    if strategy.initial == "random":
        return start
    with contextlib.closing(loader.steps(0, 1)) as steps:  # type: ignore[type-var]
        _, (images, labels) = next(steps)
    size = micro_batches_per_rank(config.train)
    masks = masks_at_start(
        place_model(copy.deepcopy(model), config.train),
        strategy,
        list(zip(torch.split(images, size), torch.split(labels, size), strict=True)),
        density=config.sparsity.density if strategy.initial_density is None else strategy.initial_density,
        dense_layers=config.sparsity.dense_layers,
        seed=config.seed,
    )
    return dataclasses.replace(start, masks=masks)


def _head(of: ModelConfig, outline: nn.Module) -> set[str]:
    """Return the names of the tensors whose shape depends on the number of classes."""
    other = models.outline(of.name, num_classes=of.num_classes + 1, args=of.args).state_dict()
    return {name for name, tensor in outline.state_dict().items() if tensor.shape != other[name].shape}


def _check_tensors(
    file: Mapping[str, Tensor], outline: nn.Module, of: ModelConfig, *, head: set[str], whose: str
) -> None:
    needed = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name in dict.fromkeys([*needed, *file]):
        if name in head or (name not in file and name.endswith("num_batches_tracked")):
            continue
        here, there = (tuple(file[name].shape) if name in file else None), needed.get(name)
        if here == there:
            continue
        shown = ["missing" if shape is None else f"of shape {list(shape)}" for shape in (there, here)]
        if name in _head(of, outline):
            raise ConfigError(
                f"{whose}: {name} is {shown[1]}, but {of.name} with {of.num_classes} classes has it {shown[0]}",
                do="set model.new_head=true to train a new last layer",
            )
        raise DataError(
            f"{whose}: does not fit {of.name}: {name} is {shown[0]} in the network, but {shown[1]} in the file",
            do="set model.name and model.args to those of the file's network",
        )


def _check_finite(file: Mapping[str, Tensor], whose: str) -> None:
    for name, tensor in file.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{whose}: {name} has a value that is not finite", do="pass weights that are finite")


def _checked_masks(
    masks: Mapping[str, Tensor], outline: nn.Module, config: Config, head: set[str], *, whose: str
) -> dict[str, Tensor]:
    """Return the masks of the configured sparse weights; a new head has one drawn at random, with as many weights."""
    expected = config.sparsity.density
    if (initial := strategy_of(config.sparsity).initial_density) is not None:
        expected = initial
    active, total = num_active(masks), num_weights(masks)
    if round(expected * total) != active:
        key = "density" if initial is None else "initial_density"
        raise ConfigError(
            f"{whose}: {active:,} of {total:,} weights are active, but sparsity.{key} is {expected:g}",
            do=f"set sparsity.{key}={active / total!r}",
        )
    weights = sparse_weights(outline, config.sparsity.dense_layers)
    for name in dict.fromkeys([*masks, *weights]):
        if (name in masks) != (name in weights):
            has = "has a mask, but is kept dense" if name in masks else "has no mask, but is sparse"
            dense = ", ".join(name for name in sparse_weights(outline) if name not in masks)
            raise ConfigError(
                f"{whose}: {name} {has} by sparsity.dense_layers {config.sparsity.dense_layers}",
                do=f"set sparsity.dense_layers=[{dense}]",
            )
    found = dict(masks)
    for name in head & masks.keys():
        shape = tuple(weights[name].shape)
        count = max(1, round(int(masks[name].count_nonzero()) / masks[name].numel() * weights[name].numel()))
        found |= random_masks({name: shape}, {name: count}, seed=config.seed)
    return found

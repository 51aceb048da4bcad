"""Masks that are chosen at initialisation, by one ranking of the initial weights of all layers.

A score gives a number to every weight, and the highest stay active. It reads a copy of the network, and
the first batch of this rank; what it computes of the batch is averaged over micro-batches and ranks, so that
all ranks have the same masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.distributed import session
from pipeline.errors import ConfigError, NumericsError
from pipeline.sparse.layers import forms_of, sparse_weights
from pipeline.sparse.select import key_of
from pipeline.sparse.strategy import Strategy, find_strategy
from pipeline.sparse.update import prune_to

Batches = Sequence[tuple[Tensor, Tensor]]  # images [n, 3, height, width] and labels, of each micro-batch
TEMPERATURE = 200.0  # GraSP's code divides logits by it


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may read. The network is a copy, which the score may change, except for its sparse weights."""

    network: nn.Module
    weights: Mapping[str, nn.Parameter]  # the sparse weights of ``network``, 0 where they are no longer active
    batches: Batches


def magnitude(inputs: ScoreInputs) -> dict[str, Tensor]:
    """|w|."""
    return {name: weight.detach().abs() for name, weight in inputs.weights.items()}


def snip(inputs: ScoreInputs) -> dict[str, Tensor]:
    """|w · g|, g the gradient of the loss (SNIP, arXiv 1810.02340, algorithm 1), as in training mode."""
    inputs.network.train()
    weights = [*inputs.weights.values()]
    gradients = _averaged(_grad(_loss(inputs, batch), weights) for batch in inputs.batches)
    return {name: (w.detach() * g).abs() for (name, w), g in zip(inputs.weights.items(), gradients, strict=True)}


def grasp(inputs: ScoreInputs) -> dict[str, Tensor]:
    """Score w · Hg, H the Hessian of the loss (GraSP, arXiv 2002.07376): the gradient flow that a weight adds.

    The paper removes the weights with the highest −w · Hg.
    """
    inputs.network.train()
    weights = [*inputs.weights.values()]

    def product(batch: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        found = _grad(_loss(inputs, batch, TEMPERATURE), weights, create_graph=True)
        flow = torch.stack([(g * mean).sum() for g, mean in zip(found, gradients, strict=True)]).sum()
        return _grad(flow, weights)

    gradients = _averaged(_grad(_loss(inputs, batch, TEMPERATURE), weights) for batch in inputs.batches)
    products = _averaged(map(product, inputs.batches))
    return {name: w.detach() * hg for (name, w), hg in zip(inputs.weights.items(), products, strict=True)}


def synflow(inputs: ScoreInputs) -> dict[str, Tensor]:
    """|w · ∂R/∂w|, R the sum of outputs of the network of |parameters| for an image of ones (arXiv 2006.05467).

    As in the paper's code in evaluation mode; in float64, which deep networks of |parameters| need.
    """
    images = inputs.batches[0][0]
    network = inputs.network.eval().double()
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.abs_()
    output = network(torch.ones_like(images[:1], dtype=torch.float64))
    flows = _grad(output.sum(), [*inputs.weights.values()])
    return {name: (w.detach() * flow).abs() for (name, w), flow in zip(inputs.weights.items(), flows, strict=True)}


@dataclass(frozen=True)
class InitialScore:
    """A row of the table of initial scores."""

    scores: Callable[[ScoreInputs], dict[str, Tensor]]  # in the weights' shapes
    rounds: int = 1  # of scoring and pruning; the density after round r is density^(r / rounds)


# name -> its score; None: the weights are drawn at random (``sparse.distribution``)
INITIAL_SCORES: dict[str, InitialScore | None] = {
    "random": None,
    "magnitude": InitialScore(magnitude),
    "snip": InitialScore(snip),
    "grasp": InitialScore(grasp),
    "synflow": InitialScore(synflow, rounds=100),
}


def masks_at_start(
    model: nn.Module,
    method: str | Strategy,
    batches: Batches,
    *,
    density: float,
    dense_layers: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the masks that ``method`` chooses at initialisation, for ``Sparsifier(…, masks=…)``.

    All ranks must call this together, each with its own part of the first batch. The model is not changed.

    Args:
        model: the network with its initial weights, equal on all ranks, on the device of the batches.
        method: a row of ``METHODS`` with an ``initial`` other than ``random``, such as ``snip``, or a Strategy.
        batches: images and labels (classes, or shares of classes) of each micro-batch of this rank.
        density: share of the weights of all sparse layers that are active, in (0, 1].
        dense_layers: names or patterns of weights that stay dense, as for the Sparsifier.
        seed: of what the network draws while it is scored (dropout).

    Raises:
        ConfigError: the method draws its masks at random, or there is no batch.
        NumericsError: a score is not finite.
    """
    strategy = find_strategy(method)
    if (row := INITIAL_SCORES[strategy.initial]) is None:
        raise ConfigError("initial: this method draws its masks at random", do="leave out masks= of the Sparsifier")
    if not batches:
        raise ConfigError("batches: expected at least one, got none", do="pass the images and labels of one step")
    shapes = {name: form.norm_shape for name, form in forms_of(model).items() if form.norm_shape is not None}
    initial = {name: w.detach() for name, w in sparse_weights(model, dense_layers).items() if w.requires_grad}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in initial.items()}
    total = sum(mask.numel() for mask in masks.values())
    devices = sorted({weight.device for weight in initial.values() if weight.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices):
        for number in range(1, row.rounds + 1):
            torch.manual_seed(key_of(seed, session.rank(), number))
            network = copy.deepcopy(model)
            weights = {name: w for name, w in sparse_weights(network, dense_layers).items() if name in initial}
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_(masks[name])
            scores = row.scores(ScoreInputs(network, weights, batches))
            if bad := [name for name, score in scores.items() if not bool(score.isfinite().all())]:
                raise NumericsError(
                    f"initial: the score of {bad[0]} is not finite ({strategy.initial})",
                    do="start from other weights, or choose another method",
                    is_reported_elsewhere=not session.is_main(),
                )
            masks = prune_to(
                masks,
                scores,
                round(density ** (number / row.rounds) * total),
                min_active=strategy.min_active,
                norm_shapes={name: shape for name, shape in shapes.items() if name in masks},
                strength=torch.Tensor.clone,
            )
    return masks


def _loss(inputs: ScoreInputs, batch: tuple[Tensor, Tensor], temperature: float = 1.0) -> Tensor:
    images, labels = batch
    logits = inputs.network(images.to(next(iter(inputs.weights.values())).dtype))
    return cross_entropy(logits.float() / temperature, labels)


def _grad(output: Tensor, weights: Sequence[Tensor], *, create_graph: bool = False) -> Sequence[Tensor]:
    """Return the gradient of each weight, 0 for those that took no part."""
    return torch.autograd.grad(output, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _averaged(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean over micro-batches and ranks of what each micro-batch gives."""
    total: list[Any] = []
    number = 0
    for part in parts:
        total = [t + p.detach() for t, p in zip(total, part, strict=True)] if total else [p.detach() for p in part]
        number += 1
    means = [(t / number).contiguous() for t in total]
    session.average(means)
    return means

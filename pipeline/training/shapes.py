"""Check before the first step that ranks get equal batches, and that the network takes every batch of images.

The outline of the network runs on the meta device, so nothing is computed and no memory is used:
ResNet-50 takes 0.4 s of a processor for its two passes. Nothing heavy is imported before a function
is called.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.schema import Config
from pipeline.data.resolution import resolutions
from pipeline.errors import ConfigError
from pipeline.files import parse_json
from pipeline.plan import EXPLORATION, Plan

if TYPE_CHECKING:
    from torch import nn

    from pipeline.tickets.store import TicketRef

SEVERAL = 2  # images: BatchNorm has a variance


@dataclass(frozen=True)
class Batch:
    """Images that the network will be given: their number on each rank, their side in pixels, and in which mode."""

    key: str  # sets the side
    num_images: int
    side: int
    is_training: bool


class Problem(NamedTuple):
    """A batch that the network does not take, why, and whether it would take more images of the same size."""

    batch: Batch
    why: str
    is_too_small: bool


def check_shares(config: Config, *, world_size: int) -> None:
    """Check that the images of a step can be divided evenly among the ranks.

    Raises:
        ConfigError: they cannot.
    """
    batch, accumulation = config.train.global_batch, config.train.accumulation
    shares = world_size * accumulation
    if batch % shares:
        raise ConfigError(
            f"train.global_batch: {batch} samples cannot be divided evenly among {world_size} ranks × {accumulation} "
            "micro-batches",
            do=f"choose a multiple of {shares}, or another number of ranks",
        )
    if config.data.mixup and batch // world_size % 2:
        raise ConfigError(
            f"data.mixup: mixes pairs, expected an even number of samples per rank and step, got {batch // world_size}",
            do=f"set train.global_batch to a multiple of {2 * world_size}",
        )


def check_shapes(config: Config, plan: Plan, *, world_size: int) -> None:
    """Check that the network takes the images of training, at every resolution, and of evaluation.

    A network that cannot run on the meta device at all is not judged.

    Raises:
        ConfigError: the network cannot be built, does not take a batch, or does not return one row
            of numbers for each image.
    """
    model, data, train = config.model, config.data, config.train
    # the engine refuses a batch that cannot be shared equally
    micro_batch = max(1, train.global_batch // (world_size * train.accumulation))
    sides = resolutions(data, -(-plan.num_steps // plan.steps_per_epoch))
    keys = {
        side: "data.train_resolution" if side == data.train_resolution else "data.first_resolution" for side in sides
    }
    batches = [Batch(key, micro_batch, side, is_training=True) for side, key in keys.items()]
    batches.append(_evaluated(config))
    num_classes = model.num_classes or 2

    def find_problem(args: dict[str, Any]) -> Problem | None:
        return _first_problem(model.name, num_classes, json.dumps(args), tuple(batches))

    found = find_problem(model.args)
    if found is None:
        return
    batch, why, is_too_small = found
    size = f"{batch.side}×{batch.side} pixels"
    if is_too_small:
        raise ConfigError(
            f"train.global_batch: {train.global_batch} images divided by {world_size} × {train.accumulation} (ranks × "
            f"train.accumulation) give a micro-batch of 1, and {model.name} does not train on 1 image of {size}: "
            f"{why}",
            do="raise train.global_batch, or lower train.accumulation",
        )
    if why.startswith("returns "):
        raise ConfigError(f"model.args: {model.name} {why}", do=_better_args(model.args, find_problem))
    in_ramp = f", which progressive resizing reaches from {data.first_resolution}"
    raise ConfigError(
        f"{batch.key}: {model.name} does not {'train' if batch.is_training else 'run'} on images of 3×{size}"
        f"{in_ramp if batch.key == 'data.first_resolution' and batch.side != data.first_resolution else ''}: {why}",
        do="choose a size that the model takes, or set model.args so that it takes this one",
    )


def check_eval_resolution(config: Config, refs: Iterable[TicketRef]) -> None:
    """Check that the networks of tickets take the images of an evaluation whose size is not that of their training.

    Raises:
        ConfigError: a network does not take the images.
        DataError: a ticket is damaged, or does not fit the network that it names.
    """
    batch, judged = _evaluated(config), set[str]()
    for ref in refs:
        of = ref.provenance
        key = json.dumps([of.model, of.num_classes, of.model_args])
        if key in judged or of.preprocessing.get("eval_resolution") == batch.side:
            continue
        judged.add(key)
        if why := _problem(_outline_of(ref), batch, batch.num_images, of.num_classes):
            raise ConfigError(
                f"{batch.key}: {of.model} does not run on images of 3×{batch.side}×{batch.side} pixels: {why}",
                do="choose a size that the model takes, or leave it out for that of the training",
            )


def _outline_of(ref: TicketRef) -> nn.Module:
    from pipeline import models
    from pipeline.tickets.format import decode

    of, state = ref.provenance, decode(ref.path).state
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return models.outline_for(shapes, of.model, num_classes=of.num_classes, args=of.model_args, whose=str(ref.path))


def _evaluated(config: Config) -> Batch:
    return Batch("data.eval_resolution", config.evaluation.batch, config.data.eval_resolution, is_training=False)


def check_recalibration(config: Config, plan: Plan, num_samples: int) -> None:
    """Check that a superposition at the end of the run finds a whole batch to recalibrate BatchNorm with.

    Raises:
        ConfigError: the training set is smaller than one batch.
    """
    batch = config.evaluation.recalibration_batch
    if config.sparsity.method != "dense" and len(superposed_tickets(config, plan)) > 1 and batch > num_samples:
        raise ConfigError(
            f"evaluation.recalibration_batch: {batch} is larger than the training set ({num_samples} samples), with "
            "which the BatchNorm statistics of the superposed network are recalibrated",
            do="choose a smaller batch",
        )


def superposed_tickets(config: Config, plan: Plan) -> list[int]:
    """Return the indices of the tickets that the run keeps and superposes at its end."""
    from pipeline.tickets.store import Retention

    retention = Retention(last=config.tickets.keep, first=config.tickets.keep_first)
    phases = {phase.ticket_index: phase.name for phase in plan.phases if phase.ticket_index is not None}
    kept = {index: name for index, name in phases.items() if retention.keeps(index, max(phases))}
    return [index for index, name in kept.items() if config.evaluation.with_exploration or name != EXPLORATION]


def _better_args(args: dict[str, Any], find_problem: Callable[[dict[str, Any]], Problem | None]) -> str:
    """Return which one of ``args`` to change, so that the network has no problem."""
    for name, value in args.items():
        others = {key: other for key, other in args.items() if key != name}
        with contextlib.suppress(ConfigError):  # the network cannot be built like this
            if value is True and find_problem({**others, name: False}) is None:
                return f"set model.args.{name}=false"
            if find_problem(others) is None:
                return f"remove {name} from model.args"
    return "choose another model.name, or set model.args so that it returns only the logits"


@functools.cache  # the runs of a sweep mostly ask the same
def _first_problem(name: str, num_classes: int, args: str, batches: tuple[Batch, ...]) -> Problem | None:
    """Return the first batch that the network does not take."""
    import torch

    from pipeline import models

    outline = models.outline(name, num_classes=num_classes, args=parse_json(args))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for batch in batches:
            if why := _problem(outline, batch, batch.num_images, num_classes):
                is_too_small = batch.is_training and batch.num_images == 1
                return Problem(batch, why, is_too_small and not _problem(outline, batch, SEVERAL, num_classes))
    return None


def _problem(outline: nn.Module, batch: Batch, num_images: int, num_classes: int) -> str:
    """Return what is wrong with the network's output for these images; empty if it is right."""
    import torch

    try:
        images = torch.empty(num_images, 3, batch.side, batch.side, device="meta")
        output = outline.train(batch.is_training)(images)
    except Exception as error:  # from the network's own code, which may raise anything
        # An operator without a form for the meta device says nothing about the network: training itself will show.
        if isinstance(error, NotImplementedError) or re.search(r"\bmeta\b", str(error)):
            return ""
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    got = f"shape {[*output.shape]}" if isinstance(output, torch.Tensor) else type(output).__name__
    mode = "training" if batch.is_training else "evaluation"
    expected = f"shape {[num_images, num_classes]}"
    is_right = got == expected
    return "" if is_right else f"returns {got} in {mode}, expected one tensor of {expected} (images, classes)"

"""What a recipe costs: FLOPs of training and inference, from its plan and the densities of its layers, and GPU-hours.

Nothing is trained and no weight is made.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline import models
from pipeline.config.load import load_config
from pipeline.config.schema import Config, strategy_of
from pipeline.data.resolution import resolution_of
from pipeline.plan import Phase, Plan, build_plan, steps_per_epoch_of
from pipeline.sparse.criteria import reads
from pipeline.sparse.distribution import densities_of
from pipeline.sparse.flops import dense_flops, flops_at, layer_macs, rigl_flops_per_sample
from pipeline.sparse.layers import Form, forms_of, sparse_weights

# ffcv-imagenet's rn50_40_epochs.yaml: 40 epochs with images that grow from 160 to 192 pixels, published as 35.6 minutes
# on 8 A100. Its arithmetic in that time is the rate by which hours are estimated.
FFCV_CONFIG, FFCV_MINUTES, FFCV_GPUS = "imagenet_r50_fast", 35.6, 8
RIGL_INTERVAL = 100  # steps between updates in RigL's tables, from which ITOP's have their training FLOPs
ANY_DATA = ["data.train=train.beton", "data.val=val.beton"]


@dataclass(frozen=True)
class Costs:
    """The costs of one run. Ratios are to the dense network, trained for ``plan.dense_reference``."""

    train: float
    test: float  # of one ticket
    epochs: float
    num_tickets: int
    gpu_hours: float


def config_of(name: str, *overrides: str) -> Config:
    """Load a recipe for data that is not there."""
    return load_config(name, [*ANY_DATA, *overrides])


def plan_of(config: Config) -> Plan:
    """Build the plan of a recipe for its number of training images."""
    return build_plan(config, steps_per_epoch=steps_per_epoch_of(config, config.data.train_samples))


def costs(config: Config) -> Costs:
    """Compute what one run of ``config`` costs.

    While the density falls (GraNet), layers are taken to have ERK's densities for the density of
    the step; a run counts its actual masks.
    """
    plan = plan_of(config)
    test_macs = macs_of(config, config.data.eval_resolution)
    reference = dense_training_flops(config, plan.reference_steps, plan.steps_per_epoch)
    return Costs(
        train=sum(_phase_flops(config, plan, phase) for phase in plan.phases) / reference,
        test=flops_at(test_macs, _layer_densities(config, config.sparsity.density)) / dense_flops(test_macs),
        epochs=plan.num_steps / plan.steps_per_epoch,
        num_tickets=sum(phase.ticket_index is not None for phase in plan.phases),
        gpu_hours=_gpu_hours(dense_training_flops(config, plan.num_steps, plan.steps_per_epoch) * plan.global_batch),
    )


def as_rigl_counts(config: Config) -> tuple[float, float]:
    """Return training and test FLOPs ratio as RigL's authors publish them, and ITOP's after them.

    Their code also counts a bias and a ReLU for each output of a layer, and takes one dense gradient
    in ΔT + 1 = 101 steps of the whole run.
    """
    plan, macs = plan_of(config), macs_of(config, config.data.eval_resolution)
    shapes = {name: weight.shape for name, weight in sparse_weights(_outline(_key(config))).items()}
    others = 2 * sum(
        count * shapes[name][0] // math.prod(shapes[name]) for name, count in macs.items()
    )  # two an output
    f_dense = dense_flops(macs) + others
    f_sparse = flops_at(macs, _layer_densities(config, config.sparsity.density)) + others
    length = plan.num_steps / plan.reference_steps
    return length * rigl_flops_per_sample(f_sparse, f_dense, RIGL_INTERVAL) / (3 * f_dense), f_sparse / f_dense


def dense_training_flops(config: Config, num_steps: int, steps_per_epoch: int) -> float:
    """Return the training FLOPs of the dense network, per sample of a step and summed over steps."""
    steps_at: dict[int, int] = {}
    for epoch in range(math.ceil(num_steps / steps_per_epoch)):
        side = resolution_of(epoch, config.data)
        steps_at[side] = steps_at.get(side, 0) + min(steps_per_epoch, num_steps - epoch * steps_per_epoch)
    return sum(3 * num * dense_flops(macs_of(config, side)) for side, num in steps_at.items())


def macs_of(config: Config, side: int) -> Mapping[str, int]:
    """Return the multiply-accumulates of each layer for an image of ``side`` pixels."""
    return _macs(_key(config), side)


def _key(config: Config) -> tuple[str, int, str]:
    """Identify the network of a recipe; the arguments are JSON, which has a hash."""
    return config.model.name, config.model.num_classes, json.dumps(config.model.args)


@functools.cache
def _outline(key: tuple[str, int, str]) -> nn.Module:
    name, num_classes, args = key
    return models.outline(name, num_classes=num_classes, args=json.loads(args))


@functools.cache
def _macs(key: tuple[str, int, str], side: int) -> Mapping[str, int]:
    return layer_macs(_outline(key), (3, side, side))


@functools.cache
def _forms(key: tuple[str, int, str]) -> Mapping[str, Form]:
    return forms_of(_outline(key))


@functools.cache
def _densities(key: tuple[str, int, str], distribution: str, density: float) -> Mapping[str, float]:
    return densities_of(_forms(key), distribution, density)


def _layer_densities(config: Config, density: float) -> Mapping[str, float]:
    return _densities(_key(config), strategy_of(config.sparsity).distribution, density)


def _phase_flops(config: Config, plan: Plan, phase: Phase) -> float:
    """Return the training FLOPs of a phase, per sample of a step and summed over steps."""
    strategy = strategy_of(config.sparsity)
    growth_reads, key = reads(strategy), _key(config)
    total = 0.0
    for start, stop, side, density in _segments(config, plan, phase):
        macs = _macs(key, side)
        f_dense, f_sparse = dense_flops(macs), flops_at(macs, _densities(key, strategy.distribution, density))
        num_dense = stop - start if "average" in growth_reads else 0
        if "gradient" in growth_reads and phase.update_at(stop - 1) is not None:
            num_dense = 1  # the update that ends the segment
        total += 3 * f_sparse * (stop - start) + (f_dense - f_sparse) * num_dense
    return total


def _segments(config: Config, plan: Plan, phase: Phase) -> Iterator[tuple[int, int, int, float]]:
    """Yield (start, stop, image side, density) of the parts of a phase within which none of the two changes."""
    schedule = phase.update_schedule.density_schedule
    density = config.sparsity.density if schedule is None else schedule(0)
    ramp = (config.data.ramp_from, config.data.ramp_until) if config.data.first_resolution else (0, 0)
    epochs = (epoch * plan.steps_per_epoch for epoch in range(ramp[0], ramp[1] + 1))
    inside = {step for step in epochs if phase.start < step < phase.stop}
    cuts = sorted({phase.start, *inside, *(step + 1 for step in phase.update_steps()), phase.stop})
    for start, stop in itertools.pairwise(cuts):
        yield start, stop, resolution_of(start // plan.steps_per_epoch, config.data), density
        due = phase.update_at(stop - 1)
        density = due.density if due is not None and due.density is not None else density


def _gpu_hours(flops: float) -> float:
    return flops / _gpu_rate() / 3600


@functools.cache
def _gpu_rate() -> float:
    """Return the FLOPs per second of one GPU, from the published time of ffcv-imagenet."""
    config = config_of(FFCV_CONFIG)
    plan = plan_of(config)
    flops = dense_training_flops(config, plan.num_steps, plan.steps_per_epoch) * plan.global_batch
    return flops / (FFCV_GPUS * FFCV_MINUTES * 60)

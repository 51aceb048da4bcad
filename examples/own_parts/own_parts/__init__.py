"""One part of each kind; importing this package registers them. See docs/own-parts.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import DataConfig, TrainConfig
from pipeline.config.timetables import TIMETABLES, PhaseOutline, Timetable
from pipeline.data.augment import AUGMENTATIONS, Augmentation, centre_box
from pipeline.engine.torch_engine import OPTIMIZERS
from pipeline.models.registry import OWN_MODELS
from pipeline.sparse import METHODS
from pipeline.sparse.criteria import GROW, PRUNE, Growth, GrowthInputs
from pipeline.sparse.distribution import DISTRIBUTIONS
from pipeline.tracking import TRACKERS
from pipeline.tracking.tracker import JsonLinesTracker


class TinyNet(nn.Sequential):
    """A network: called with ``num_classes`` and ``model.args``."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )


def last_first(inputs: GrowthInputs) -> Tensor:
    """A grow criterion: a score [n] per position; the highest inactive ones grow."""
    return torch.arange(inputs.num_weights, device=inputs.device)


def magnitude_squared(values: Tensor) -> Tensor:
    """A prune criterion: a score per active weight; the lowest are pruned."""
    return values.square()


def by_fan_in(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """A distribution: a density for each layer, in inverse proportion to the root of its fan-in."""
    raw = {name: 1 / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    scale = density * sum(sizes.values()) / sum(raw[name] * sizes[name] for name in shapes)
    return {name: min(1.0, scale * raw[name]) for name in shapes}


def one_refinement(num_refinements: int) -> list[PhaseOutline]:
    """A timetable: the phases of a run, in their order."""
    return [PhaseOutline("exploration", "exploration"), PhaseOutline("last", "refinement")]


def three_quarters(data: DataConfig) -> Augmentation:
    """An augmentation: which part of a training image is taken."""
    return Augmentation(centre_box(0.75), data.flip)


def rmsprop(model: nn.Module, groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """An optimiser, for parameter groups with their weight decay; the engine sets the rate of each step."""
    return torch.optim.RMSprop(groups, lr=0.0, eps=train.eps)


class LastLoss(JsonLinesTracker):
    """A tracker: also keeps the last loss in a file of its own."""

    def __init__(self, output_dir: Path, **more: Any) -> None:
        super().__init__(output_dir, **more)
        self._file = output_dir / "last-loss.txt"

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write the loss of this step, if there is one."""
        super().log_metrics(metrics, step=step)
        if "train/loss" in metrics:
            self._file.write_text(f"{step} {metrics['train/loss']:.4f}\n")


OWN_MODELS["tiny_net"] = TinyNet
GROW["last_first"] = Growth(last_first)  # reads="gradient" or "average" if it uses inputs.gradient or inputs.average
PRUNE["magnitude_squared"] = magnitude_squared
DISTRIBUTIONS["by_fan_in"] = by_fan_in
METHODS["last_itop"] = replace(
    METHODS["set_itop"], grow="last_first", prune="magnitude_squared", distribution="by_fan_in"
)
TIMETABLES["one_refinement"] = Timetable(one_refinement, "exploration and one refinement", has_refinements=True)
AUGMENTATIONS["three_quarters"] = three_quarters
OPTIMIZERS["rmsprop"] = rmsprop
TRACKERS["last_loss"] = LastLoss

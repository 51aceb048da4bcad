"""The history of a run, read from its ``metrics.jsonl``, for the figures of training. Does not need torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.tracking.journal import read_records

T = TypeVar("T")


@dataclass(frozen=True)
class History:
    """What a run reported while it trained; steps that were computed twice count once."""

    steps_per_epoch: float
    curves: Mapping[str, Mapping[int, float]]  # metric -> step -> value
    # layer -> step of a topology update -> density after it, R_s after it
    layers: Mapping[str, Mapping[int, tuple[float, float]]] = field(default_factory=dict)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Return the epochs and values of a metric; both are empty if the run did not report it."""
        points = sorted(self.curves.get(key, {}).items())
        return [(step + 1) / self.steps_per_epoch for step, _ in points], [value for _, value in points]

    def of_layer(self, layer: str) -> tuple[list[float], list[float], list[float]]:
        """Return the epochs of a layer's topology updates, and its density and R_s after them."""
        points = sorted(self.layers[layer].items())
        epochs = [(step + 1) / self.steps_per_epoch for step, _ in points]
        return epochs, [density for _, (density, _) in points], [r_s for _, (_, r_s) in points]


def read_history(output_dir: Path) -> History | None:
    """Read the history of the run in a folder; None if the folder has no record of a training step."""
    return history_of(read_records(output_dir))


def history_of(records: Iterable[Mapping[str, Any]]) -> History | None:
    """Return the history in the records of a journal; None without a record of a training step."""
    curves: dict[str, dict[int, float]] = {}
    layers: dict[str, dict[int, tuple[float, float]]] = {}
    for record in records:
        if "resumed_from_step" in record:  # what was computed after the checkpoint is computed again
            first = record["resumed_from_step"]
            curves = {key: _before(first, points) for key, points in curves.items()}
            layers = {name: _before(first, points) for name, points in layers.items()}
        elif "layers" in record:
            for name, (density, r_s) in record["layers"].items():
                layers.setdefault(name, {})[record["after_step"]] = (density, r_s)
        elif "step" in record:
            for key, value in record["metrics"].items():
                curves.setdefault(key, {})[record["step"]] = float(value)
    epochs = curves.get("train/epoch")
    if not epochs:
        return None
    last = max(epochs)
    return History((last + 1) / epochs[last], curves, layers)


def _before(step: int, points: Mapping[int, T]) -> dict[int, T]:
    return {at: value for at, value in points.items() if at < step}

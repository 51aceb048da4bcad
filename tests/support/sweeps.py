"""Sweeps of runs of a few seconds, on two classes of small images that can be told apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from launchers.sweep_members import Member, axes_of, members_of
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.evaluation.predictions import Predictions, load_predictions, save_predictions
from tests.support.launch import ROOT

NUM_VAL = 80
CONFIGURATION = """\
base: fashion_mnist_s90
name: small
model: {{args: {{width: 8, stem_stride: 2}}, num_classes: 2}}
data: {{loader: folder, train: {0}/train, val: {0}/val, num_workers: 1}}
train: {{global_batch: 16, threads_per_rank: 1, engine: torch}}
sparsity: {{density: 0.2}}
plan:
  reference_batch: 16
  exploration: {{length: 10 steps, update_interval: 2 steps}}
  num_refinements: 1
  refinement: {{length: 4 steps}}
evaluation: {{every: never, recalibration_batches: 2, recalibration_batch: 16, batch: 40}}
checkpoint: {{every: 4 steps, keep: 2}}
tracking: {{backend: jsonl, log_every_steps: 10}}
"""


def make_configuration(folder: Path) -> Path:
    """Write images and ``small.yaml``, and return its path."""
    draw = np.random.default_rng(0)
    for split, num_images in (("train", 192), ("val", NUM_VAL)):
        for index in range(num_images):
            label = index % 2
            pixels = draw.integers(0, 200, (12, 12, 3))
            pixels[:, :6] += 20 * label
            of_class = folder / split / f"class{label}"
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(of_class / f"{index:03d}.png")
    path = folder / "small.yaml"
    path.write_text(CONFIGURATION.format(folder))
    return path


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of launchers/sweep.py."""
    return [sys.executable, str(ROOT / "launchers" / "sweep.py"), *map(str, arguments)]


NAMES = ("ticket-0", "ticket-1", "superposition-mean", "ensemble-2")
KINDS = ("ticket", "ticket", "superposition", "ensemble")


def leave_report(folder: Path, seed: int, skill: float) -> Predictions:
    """Write a report of random predictions, from which its numbers follow."""
    draw = np.random.default_rng([seed, round(1000 * skill)])
    labels = np.random.default_rng(5).integers(0, 10, 200)
    shape = (len(NAMES), 200)
    top1 = np.where(draw.random(shape) < skill, labels, draw.integers(0, 10, shape))
    found = Predictions(NAMES, labels, top1, draw.exponential(0.3, shape), draw.uniform(0.1, 1, shape))
    folder.mkdir(parents=True)
    save_predictions(found, folder / "predictions.npz", data_digest="ab12")
    found = load_predictions(folder / "predictions.npz")
    rows = [
        {
            "name": name,
            "kind": kind,
            "top1": float((found.top1[row] == labels).mean()),
            "nll": float(found.nll[row].mean(dtype=np.float64)),
            "ece": 0.25,
            "r_s": 0.5,
            "training_flops_ratio": None,
            "inference_flops_ratio": 0.2,
        }
        for row, (name, kind) in enumerate(zip(NAMES, KINDS, strict=True))
    ]
    (folder / "report.json").write_text(json.dumps({"rows": rows}))
    return found


def members(
    configuration: Path, folder: Path, sets: Sequence[str], *, variants: Sequence[str] = (), seeds: Sequence[int] = (0,)
) -> list[Member]:
    """Return the members of a sweep with the given options."""

    def load(settings: Sequence[str]) -> Config:
        return load_config(str(configuration), settings)

    return members_of(axes_of(sets, variants), seeds, settings=[], folder=folder, load=load)

"""Sweeps of runs of a few seconds, on two classes of small images that can be told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.launch import ROOT

NUM_VAL = 80
CONFIGURATION = """\
base: fashion_mnist_s90
name: small
model: {{args: {{width: 4, stem_stride: 2}}, num_classes: 2}}
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

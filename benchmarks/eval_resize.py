"""Measure what ``data.eval_resize`` does to a network's predictions: ``python -m benchmarks.eval_resize``.

A small network learns, through the folder loader, from which quarter of which photograph of
scikit-learn and scikit-image a crop is (36 classes; crops and grain differ between training and
evaluation). It is then evaluated with both ways of resizing. Printed for every seed:

pixels    mean difference between the two, of 255
top-1     accuracy with each
agree     share of the images for which both give the same class
change    mean over the images of the largest change of a probability
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.support.photographs import QUALITY, _sources
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import open_eval_loader, open_train_loader
from pipeline.evaluation.metrics import top1
from pipeline.models.registry import build

SIDE, GRAIN, BATCH = 160, 25.0, 64
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=400, metavar="N", help="training steps of 64 images (default: 400)"
    )
    parser.add_argument("--images", type=int, default=60, metavar="N", help="images per class and split (default: 60)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of networks (default: 3)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for seed, split in enumerate(("train", "val")):
            write(root / split, given.images, seed=seed)
        data = DataConfig(
            loader="folder",
            train=str(root / "train"),
            val=str(root / "val"),
            num_workers=1,
            min_scale=0.35,
            flip=False,
            train_resolution=96,
            eval_resolution=96,
        )
        for seed in range(given.seeds):
            report(seed, train(data, steps=given.steps, seed=seed), data)


def write(folder: Path, images_per_class: int, *, seed: int) -> None:
    """Write crops of every quarter of every photograph, with grain, as JPEG files."""
    random = np.random.default_rng(seed)
    for name, photograph in sorted(_sources().items()):
        height, width = photograph.shape[0] // 2, photograph.shape[1] // 2
        for quarter in range(4):
            part = photograph[quarter // 2 * height :, quarter % 2 * width :][:height, :width, :3]
            target = folder / f"{name}-{quarter}"
            target.mkdir(parents=True)
            for index in range(images_per_class):
                side = int(min(height, width) * random.uniform(0.5, 0.9))
                top, left = random.integers(height - side), random.integers(width - side)
                crop = Image.fromarray(np.ascontiguousarray(part[top : top + side, left : left + side]))
                pixels = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
                pixels = np.clip(pixels + random.normal(0.0, GRAIN, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{index:04}.jpg", quality=QUALITY)


def train(data: DataConfig, *, steps: int, seed: int) -> nn.Module:
    """Train a network on the crops, with the loader of a run."""
    model = build("cifar_resnet8", num_classes=36, args={"width": 16, "stem_stride": 2}, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    loader = open_train_loader(Path(data.train), data, global_batch=BATCH, seed=seed, device=CPU, channels_last=True)
    for _, (images, labels) in loader.steps(0, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, data: DataConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities [images, classes], labels [images] and images [images, 3, side, side]."""
    loader = open_eval_loader(Path(data.val), data, batch=BATCH, device=CPU, channels_last=True)
    parts = [(model(images).softmax(1), labels, images.clone()) for _, images, labels in loader.batches()]
    probabilities, labels, images = zip(*parts, strict=True)
    return torch.cat(probabilities), torch.cat(labels), torch.cat(images)


def report(seed: int, model: nn.Module, data: DataConfig) -> None:
    area, labels, images = predict(model, data)
    theirs, _, others = predict(model, dataclasses.replace(data, eval_resize="torchvision"))
    pixels = ((images - others).abs() * torch.tensor(data.std).view(3, 1, 1)).mean()
    agree = (area.argmax(1) == theirs.argmax(1)).double().mean()
    print(
        f"seed {seed}, {len(labels)} images: pixels {pixels:.2f}  top-1 area {top1(area, labels):.4f} "
        f"torchvision {top1(theirs, labels):.4f}  agree {agree:.4f}  change {(area - theirs).abs().amax(1).mean():.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

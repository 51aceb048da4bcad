"""ImageNet-shaped data: many class folders of real JPEG photographs, cut out of the two photographs that come with scikit-learn."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def class_name(label: int) -> str:
    """``n00000001`` for label 0: sorted by name is sorted by label."""
    return f"n{label + 1:08d}"


def make_image_folder(
    root: Path, num_classes: int = 1000, train_per_class: int = 2, val_per_class: int = 1, seed: int = 0
) -> tuple[Path, Path]:
    """Write ``root/train`` and ``root/val`` in torchvision's ImageFolder layout and return both paths.

    Every image is another crop of a photograph, scaled to sides of about 300 to 500 pixels and flipped or not: the same for the same seed.
    """
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    jobs = []
    for split, per_class in (("train", train_per_class), ("val", val_per_class)):
        for label in range(num_classes):
            folder = root / split / class_name(label)
            folder.mkdir(parents=True)
            jobs += [(folder / f"{class_name(label)}_{index}.JPEG", split == "val", label, index) for index in range(per_class)]

    def write(job: tuple[Path, bool, int, int]) -> None:
        path, is_val, label, index = job
        random = np.random.default_rng((seed, is_val, label, index))
        _crop(photographs[random.integers(len(photographs))], random).save(path, "JPEG", quality=int(random.integers(75, 96)))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow releases the interpreter lock
        list(pool.map(write, jobs))
    return root / "train", root / "val"


def _crop(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    width, height = (int(side * random.uniform(0.4, 1.0)) for side in photograph.size)
    left, top = int(random.integers(photograph.width - width + 1)), int(random.integers(photograph.height - height + 1))
    size = (int(random.integers(300, 501)), int(random.integers(300, 501)))
    image = photograph.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

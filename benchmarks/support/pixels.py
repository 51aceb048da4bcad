"""Measures how much pixels differ between decoders and between ways to resize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from benchmarks.support.bars import Figure
from pipeline.data.augment import random_crop_box, resize, sample_stream
from pipeline.datasets.folder_listing import list_images

SIDE = 224


def differences(folder: Path, *, num_images: int) -> Iterator[Figure]:
    """Yield one result per comparison, on the same images and the same boxes.

    Each has the mean absolute difference, the share of values that differ by more than 8, and the
    largest difference; values are 0 to 255.
    """
    box_of = random_crop_box(0.08)
    found: dict[str, list[NDArray[np.int16]]] = {}
    _, listed = list_images(folder)
    for sample in np.linspace(0, len(listed) - 1, num_images).astype(int):
        path = listed[sample][0]
        with Image.open(path) as file:
            pillow = np.asarray(file.convert("RGB"))
        turbo = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        opencv = np.asarray(cv2.imread(str(path)))[..., ::-1]
        stream = np.uint64(sample_stream(np.uint64(1), int(sample)))
        top, left, height, width = box = box_of(*pillow.shape[:2], stream)  # type: ignore[call-arg]
        ours = np.empty((SIDE, SIDE, 3), np.uint8)
        resize(pillow, box, False, ours)
        part = pillow[top : top + height, left : left + width]
        tensor = torch.from_numpy(part.copy()).permute(2, 0, 1)
        bilinear = functional.resize(tensor, [SIDE, SIDE], v2.InterpolationMode.BILINEAR, antialias=True)
        area = cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        kind = "shrunk" if min(height, width) >= SIDE else "enlarged" if max(height, width) <= SIDE else "one way each"
        for name, a, b in (
            ("decoders: torchvision / Pillow", turbo, pillow),
            ("decoders: OpenCV / Pillow", opencv, pillow),
            (f"ours / torchvision's antialiased bilinear, {kind}", ours, bilinear.permute(1, 2, 0).numpy()),
            (f"ours / OpenCV's area, {kind}", ours, area),
        ):
            found.setdefault(name, []).append(np.abs(a.astype(np.int16) - b).reshape(-1))
    for name, parts in sorted(found.items()):
        every = np.concatenate(parts)
        numbers = {"mean": float(every.mean()), "above 8": float((every > 8).mean()), "largest": float(every.max())}
        text = f"mean {numbers['mean']:.3f}, above 8: {numbers['above 8']:.2%}, largest {numbers['largest']:.0f}"
        text += f" ({len(parts)} images)"
        yield Figure(name, text, numbers)

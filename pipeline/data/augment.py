"""Crop and flip images as a pure function of (seed, epoch, sample), without a generator whose state must be saved.

Needs numba, not ffcv.

Random numbers are counter-based: ``uniform(stream, draw)`` hashes (key, sample, draw) with
splitmix64 (Steele, Lea and Flood, OOPSLA 2014), where the key stands for (seed, epoch). Draw 0 of a
sample decides its flip; draws from 1 on decide its *box*, the part of the image that becomes the
output: ``box(height, width, stream) -> (top, left, height, width)`` in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.schema import DataConfig
from pipeline.data.bilinear import Box, needed_box, resize_bilinear
from pipeline.data.compiled import compiled, compiled_once

PADDING = 4
NUM_ATTEMPTS = 10
LOG_RATIO_LOW, LOG_RATIO_HIGH = math.log(3 / 4), math.log(4 / 3)


# typed constants, because numba turns uint64 combined with a signed integer into float64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)
_ONE = np.uint64(1)


@compiled
def _mix(bits: np.uint64) -> np.uint64:
    bits = (bits ^ (bits >> _30)) * _FACTOR_1
    bits = (bits ^ (bits >> _27)) * _FACTOR_2
    return bits ^ (bits >> _31)


@compiled
def sample_stream(key: np.uint64, sample: int) -> np.uint64:
    """Return the seed of one sample's stream in the epoch that ``key`` stands for."""
    return _mix(key ^ _mix(np.uint64(sample) + _GOLDEN))


@compiled
def uniform(stream: np.uint64, draw: int) -> float:
    """Return draw number ``draw`` of a stream: one of 2^53 equally likely numbers in [0, 1)."""
    return float(_mix(stream + (np.uint64(draw) + _ONE) * _GOLDEN) >> _11) * 2.0**-53


def random_crop_box(min_scale: float) -> Box:
    """Return a function that draws boxes with the distribution of torchvision's ``RandomResizedCrop``.

    The area is uniform in [min_scale, 1] of the image, the aspect ratio log-uniform in [3/4, 4/3].
    After ten boxes that do not fit, the largest centred box with an allowed ratio is taken.
    """

    @compiled
    def box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
        for attempt in range(NUM_ATTEMPTS):
            area = height * width * (min_scale + (1.0 - min_scale) * uniform(stream, 1 + 2 * attempt))
            ratio = math.exp(LOG_RATIO_LOW + (LOG_RATIO_HIGH - LOG_RATIO_LOW) * uniform(stream, 2 + 2 * attempt))
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform(stream, 1 + 2 * NUM_ATTEMPTS) * (height - h + 1))
                left = int(uniform(stream, 2 + 2 * NUM_ATTEMPTS) * (width - w + 1))
                return top, left, h, w
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    return box


def centre_box(ratio: float) -> Box:
    """Return a function that takes the centred square whose side is ``ratio`` times the shorter side."""

    @compiled
    def box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
        side = max(1, int(ratio * min(height, width)))
        return (height - side) // 2, (width - side) // 2, side, side

    return box


@compiled
def whole_box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
    """Take the whole image."""
    return 0, 0, height, width


def pad_crop(fill: Sequence[float]) -> Callable[[Any, np.uint64, bool, Any], None]:
    """Return a function that takes a random window of an image padded by 4 pixels on each side (CIFAR).

    It is called as ``place(image, stream, is_flipped, out)``, with ``image`` and ``out`` of the same
    size.

    Args:
        fill: value of the padding, one per channel, 0–255, rounded to whole pixel values. With the
            mean of the data set the padding is zero after normalisation, up to an error of 0.5 /
            std from rounding. (The authors' code pads CIFAR-100 with black, CIFAR-10 by reflection.)
    """
    border = np.array([round(value) for value in fill], dtype=np.uint8)

    @compiled
    def place(image: Any, stream: np.uint64, is_flipped: bool, out: Any) -> None:
        height, width = out.shape[0], out.shape[1]
        down = int(uniform(stream, 1) * (2 * PADDING + 1)) - PADDING
        right = int(uniform(stream, 2) * (2 * PADDING + 1)) - PADDING
        for row in range(height):
            for column in range(width):
                source_row, source_column = row + down, right + (width - 1 - column if is_flipped else column)
                is_inside = 0 <= source_row < height and 0 <= source_column < width
                for channel in range(3):
                    out[row, column, channel] = (
                        image[source_row, source_column, channel] if is_inside else border[channel]
                    )

    return place


@compiled_once
def _overlaps(size: int, first: Any, share: Any) -> None:
    """Compute how equal intervals cover ``size`` cells.

    Args:
        size: number of cells.
        first: set to the first cell of each interval, [intervals].
        share: zeros; set to the share of each cell from the first one on, [intervals, taps].
    """
    scale = size / len(first)
    for out in range(len(first)):
        start, stop = out * scale, (out + 1) * scale
        first[out] = cell = int(start)
        while cell < size and cell < stop:
            low = start if start > cell else float(cell)
            high = stop if stop < cell + 1 else cell + 1.0
            share[out, cell - first[out]] = (high - low) / scale
            cell += 1


@compiled_once
def resize(image: Any, box: tuple[int, int, int, int], is_flipped: bool, out: Any) -> None:
    """Resize a box of ``image`` into ``out``; every pixel is the mean of the area it covers.

    This is OpenCV's area interpolation, nearly three times as fast, with the same arithmetic on
    every machine, and also exact where a box is enlarged. A box of the output's size is copied
    unchanged.

    Args:
        image: uint8 [height, width, 3].
        box: (top, left, height, width) in pixels.
        is_flipped: mirror the output left to right.
        out: uint8 [height, width, 3], of any size.
    """
    top, left, height, width = box
    num_columns, row_length = out.shape[1], 3 * image.shape[1]
    flat, flat_out = image.reshape(-1), out.reshape(-1)
    taps = max(3, 2 + max(height // out.shape[0], width // num_columns))
    first_row, row_share = np.zeros(out.shape[0], np.int64), np.zeros((out.shape[0], taps), np.float32)
    first_column, column_share = np.zeros(num_columns, np.int64), np.zeros((num_columns, taps), np.float32)
    _overlaps(height, first_row, row_share)
    _overlaps(width, first_column, column_share)
    # the columns of row_sum beyond the box stay 0
    row_sum, pixels = np.zeros(3 * (width + taps), np.float32), np.zeros(3 * num_columns, np.float32)
    for y in range(out.shape[0]):
        for k in range(taps):
            share = row_share[y, k]
            if k > 0 and share == 0:
                break
            start = (top + first_row[y] + k) * row_length + 3 * left
            source = flat[start : start + 3 * width]
            if k == 0:
                for i in range(3 * width):
                    row_sum[i] = share * source[i]
            else:
                for i in range(3 * width):
                    row_sum[i] += share * source[i]
        for x in range(num_columns):
            cells = row_sum[3 * first_column[x] : 3 * (first_column[x] + taps)]
            at = 3 * (num_columns - 1 - x if is_flipped else x)
            pixel = pixels[at : at + 3]
            first, second, third = column_share[x, 0], column_share[x, 1], column_share[x, 2]
            pixel[0] = first * cells[0] + second * cells[3] + third * cells[6]
            pixel[1] = first * cells[1] + second * cells[4] + third * cells[7]
            pixel[2] = first * cells[2] + second * cells[5] + third * cells[8]
            for k in range(3, taps):
                for channel in range(3):
                    pixel[channel] += column_share[x, k] * cells[3 * k + channel]
        target = flat_out[3 * num_columns * y : 3 * num_columns * (y + 1)]
        # a loop of its own, because storing bytes between the sums above would keep them from overlapping
        for i in range(3 * num_columns):
            target[i] = np.uint8(pixels[i] + np.float32(0.5))


@dataclass(frozen=True)
class Augmentation:
    """How an image becomes an output: its box is resized, or with ``fill`` a window of the padded image is taken."""

    box: Box
    flip: bool = False
    fill: tuple[float, ...] | None = None  # border of ``pad_crop``, one value per channel, 0–255
    shorter: int = 0  # as torchvision: the box is what is needed of an image whose shorter side is scaled to this


# (image or the part of it that was decoded, place of the part in the image, size of the image, box in the
# image, stream, is_flipped, out); places are (top, left), sizes (height, width), in pixels
Place = Callable[[Any, tuple[int, int], tuple[int, int], tuple[int, int, int, int], np.uint64, bool, Any], None]


def place_of(augmentation: Augmentation) -> Place:
    """Return the function that writes an augmented image; it can be compiled, and is fast without."""
    if augmentation.fill is not None:
        padded = pad_crop(augmentation.fill)

        def place(image, part, size, box, stream, is_flipped, out):  # type: ignore[no-untyped-def]
            padded(image, stream, is_flipped, out)

    elif augmentation.shorter:
        assert not augmentation.flip, "only evaluation resizes as torchvision does"
        shorter = augmentation.shorter

        def place(image, part, size, box, stream, is_flipped, out):  # type: ignore[no-untyped-def]
            resize_bilinear(image, part, size, (box[0], box[1]), shorter, out)

    else:

        def place(image, part, size, box, stream, is_flipped, out):  # type: ignore[no-untyped-def]
            resize(image, (box[0] - part[0], box[1] - part[1], box[2], box[3]), is_flipped, out)

    return place


AUGMENTATIONS: dict[str, Callable[[DataConfig], Augmentation]] = {
    "random_resized_crop": lambda data: Augmentation(random_crop_box(data.min_scale), data.flip),
    "pad_crop_flip": lambda data: Augmentation(whole_box, data.flip, tuple(data.mean)),
    "none": lambda data: Augmentation(centre_box(1.0), data.flip),
}


def training_augmentation(data: DataConfig) -> Augmentation:
    """Return the configured augmentation of training images."""
    return AUGMENTATIONS[data.augmentation](data)


def evaluation_augmentation(data: DataConfig) -> Augmentation:
    """Return the centre crop for evaluation, of ``data.eval_ratio`` times the shorter side."""
    if data.eval_resize == "torchvision":
        shorter = round(data.eval_resolution / data.eval_ratio)
        return Augmentation(needed_box(data.eval_resolution, shorter), shorter=shorter)
    return Augmentation(centre_box(data.eval_ratio))

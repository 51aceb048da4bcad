"""Crop and flip as a pure function of (seed, epoch, sample): no generator, no state, nothing to save.

Needs numba, not ffcv.

Random numbers are counter-based: ``uniform(stream, draw)`` hashes (key, sample, draw) with
splitmix64 (Steele, Lea and Flood, OOPSLA 2014). The key stands for (seed, epoch). Draw 0 of a
sample is its flip, the draws from 1 on belong to its *box*: the part of the image that becomes the
output, ``box(height, width, stream) -> (top, left, height, width)`` in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from pipeline.config.schema import DataConfig

F = TypeVar("F", bound=Callable[..., Any])
Box = Callable[[int, int, np.uint64], tuple[int, int, int, int]]

PADDING = 4
NUM_ATTEMPTS = 10
LOG_RATIO_LOW, LOG_RATIO_HIGH = math.log(3 / 4), math.log(4 / 3)


def compiled(function: F) -> F:
    """Compile with numba.

    Without its fastmath, which ffcv uses: the crop of a sample must not depend on how a loop was
    vectorised.
    """
    return cast(F, njit(nogil=True, error_model="numpy")(function))


def compiled_once(function: F) -> F:
    """``compiled``, and kept on disk where that can be.

    Not for what uses other files' functions: numba would not notice changes.
    """
    try:
        return cast(F, njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # no folder can be written
        return compiled(function)


# numba turns uint64 with a signed integer into float64, hence typed constants
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
    """The seed of one sample's stream in the epoch that ``key`` stands for."""
    return _mix(key ^ _mix(np.uint64(sample) + _GOLDEN))


@compiled
def uniform(stream: np.uint64, draw: int) -> float:
    """Draw number ``draw`` of a stream: one of 2^53 equally likely numbers in [0, 1)."""
    return float(_mix(stream + (np.uint64(draw) + _ONE) * _GOLDEN) >> _11) * 2.0**-53


def random_crop_box(min_scale: float) -> Box:
    """Boxes with the distribution of torchvision's ``RandomResizedCrop``.

    Area uniform in [min_scale, 1] of the image, log-uniform aspect ratio in [3/4, 4/3]; after ten
    boxes that do not fit, the largest centred one with an allowed ratio.
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
    """The centred square of side ``ratio`` times the shorter side."""

    @compiled
    def box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
        side = max(1, int(ratio * min(height, width)))
        return (height - side) // 2, (width - side) // 2, side, side

    return box


@compiled
def whole_box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
    """The whole image."""
    return 0, 0, height, width


def pad_crop(fill: Sequence[float]) -> Callable[[Any, np.uint64, bool, Any], None]:
    """``place(image, stream, is_flipped, out)``: a random window of the image padded by 4 pixels on each side (CIFAR); both have one size.

    ``fill`` (one value a channel, 0–255) is rounded to whole pixel values. With the data set's mean
    the padding is zero after normalisation, up to that rounding: at most 0.5 / std. (In the
    authors' code CIFAR-100 is padded with black, CIFAR-10 by reflection.)
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
    """How equal intervals cover ``size`` cells: ``first`` cell [intervals], and ``share`` of each cell from there on [intervals, taps].

    ``share`` comes as zeros.
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
    """Fill ``out`` with the box (top, left, height, width) of ``image``: every pixel is the mean of the area it covers. uint8 [·, ·, 3].

    OpenCV's area interpolation, nearly three times as fast, with the same arithmetic on every
    machine, and exact too where a box is enlarged. A box of the output's size is copied unchanged.
    """
    top, left, height, width = box
    num_columns, row_length = out.shape[1], 3 * image.shape[1]
    flat, flat_out = image.reshape(-1), out.reshape(-1)
    taps = max(3, 2 + max(height // out.shape[0], width // num_columns))
    first_row, row_share = np.zeros(out.shape[0], np.int64), np.zeros((out.shape[0], taps), np.float32)
    first_column, column_share = np.zeros(num_columns, np.int64), np.zeros((num_columns, taps), np.float32)
    _overlaps(height, first_row, row_share)
    _overlaps(width, first_column, column_share)
    row_sum, pixels = (
        np.zeros(3 * (width + taps), np.float32),
        np.zeros(3 * num_columns, np.float32),
    )  # 0: what lies beyond the box
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
        for i in range(
            3 * num_columns
        ):  # apart: storing bytes between the sums above keeps a compiler from overlapping them
            target[i] = np.uint8(pixels[i] + np.float32(0.5))


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image: its box is resized to the output, or, with ``fill``, the image is padded and a window of it taken."""

    box: Box
    flip: bool = False
    fill: tuple[float, ...] | None = None  # value of the border of ``pad_crop``, one a channel, 0–255


def training_augmentation(data: DataConfig) -> Augmentation:
    """As configured."""
    if data.augmentation == "random_resized_crop":
        return Augmentation(random_crop_box(data.min_scale), data.flip)
    if data.augmentation == "pad_crop_flip":
        return Augmentation(whole_box, data.flip, tuple(data.mean))
    return Augmentation(centre_box(1.0), data.flip)


def evaluation_augmentation(data: DataConfig) -> Augmentation:
    """The centre crop of ``data.eval_ratio`` times the shorter side."""
    return Augmentation(centre_box(data.eval_ratio))

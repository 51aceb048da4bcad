"""Resize an image for evaluation as torchvision's ``Resize`` and ``CenterCrop`` do, to the bit for whole images.

The image is scaled so that its shorter side has the resolution divided by ``data.eval_ratio``
(224 / 0.875 = 256 pixels), and the central square is taken. Of a scaled pixel's neighbours the nearer
ones count more (a triangle as wide as two scaled pixels: antialiased bilinear). Rows are scaled first
and rounded to whole levels, then columns, with weights in units of 2^-22, as Pillow does, which
torchvision calls. Only what the square needs is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.data.compiled import compiled, compiled_once

Box = Callable[[int, int, np.uint64], tuple[int, int, int, int]]

BITS = 22  # of the fraction of a weight: 255 times a weight of 1 fits into 31 bits


@compiled_once
def _reach(index: int, size: int, scaled_size: int) -> tuple[int, int]:
    """Return the first cell, and the one behind the last, that scaled cell ``index`` is made from."""
    scale = size / scaled_size
    centre, radius = (index + 0.5) * scale, max(scale, 1.0)
    return max(int(centre - radius + 0.5), 0), min(int(centre + radius + 0.5), size)


@compiled_once
def _weights(start: int, size: int, scaled_size: int, first: Any, weight: Any) -> None:
    """Compute what the scaled cells from ``start`` on are made from.

    Args:
        start: the first scaled cell that is needed.
        size: number of cells.
        scaled_size: number of scaled cells.
        first: set to the first cell of each scaled one, [cells].
        weight: zeros; set to the weight of each cell from the first one on, int64 [cells, taps].
    """
    scale = size / scaled_size
    radius = max(scale, 1.0)
    nearness = np.zeros(weight.shape[1], np.float64)
    for out in range(len(first)):
        begin, end = _reach(start + out, size, scaled_size)
        first[out] = begin
        total = 0.0
        for k in range(end - begin):
            distance = abs((begin + k - (start + out + 0.5) * scale + 0.5) * (1.0 / radius))
            nearness[k] = 1.0 - distance if distance < 1.0 else 0.0
            total += nearness[k]
        for k in range(end - begin):
            weight[out, k] = int(0.5 + nearness[k] / total * (1 << BITS))


@compiled_once
def _scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return the size of an image whose shorter side is scaled to ``shorter`` pixels."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


@compiled_once
def _middle(size: int, resolution: int) -> int:
    """Return where the central square begins; half a pixel is rounded to an even number."""
    return round((size - resolution) / 2.0)


def needed_box(resolution: int, shorter: int) -> Box:
    """Return a function that gives the part of an image which the central square is made from.

    Args:
        resolution: side of the square, in pixels.
        shorter: what the shorter side of the image is scaled to, in pixels.
    """

    @compiled
    def box(height: int, width: int, stream: np.uint64) -> tuple[int, int, int, int]:
        scaled_height, scaled_width = _scaled(height, width, shorter)
        top = _middle(scaled_height, resolution)
        left = _middle(scaled_width, resolution)
        first_row = _reach(top, height, scaled_height)[0]
        first_column = _reach(left, width, scaled_width)[0]
        num_rows = _reach(top + resolution - 1, height, scaled_height)[1] - first_row
        num_columns = _reach(left + resolution - 1, width, scaled_width)[1] - first_column
        return first_row, first_column, num_rows, num_columns

    return box


@compiled_once
def resize_bilinear(
    image: Any, part: tuple[int, int], size: tuple[int, int], start: tuple[int, int], shorter: int, out: Any
) -> None:
    """Scale an image and take its central square.

    Args:
        image: uint8 [height, width, 3], the whole image or a part that contains the ``needed_box``.
        part: (top, left) of ``image`` in the whole image.
        size: (height, width) of the whole image.
        start: (top, left) of the ``needed_box`` in the whole image.
        shorter: what its shorter side is scaled to, in pixels.
        out: uint8 [resolution, resolution, 3].
    """
    top, left = start
    top_here, left_here = top - part[0], left - part[1]
    height, width = size
    resolution = out.shape[0]
    scaled_height, scaled_width = _scaled(height, width, shorter)
    first_row, first_column = np.zeros(resolution, np.int64), np.zeros(resolution, np.int64)
    num_taps = 3 + 2 * int(np.ceil(max(height / scaled_height, width / scaled_width, 1.0)))
    row_weight = np.zeros((resolution, num_taps), np.int64)
    column_weight = np.zeros((resolution, num_taps), np.int64)
    _weights(_middle(scaled_height, resolution), height, scaled_height, first_row, row_weight)
    _weights(_middle(scaled_width, resolution), width, scaled_width, first_column, column_weight)
    half = 1 << (BITS - 1)
    num_rows = min(first_row[resolution - 1] - top + num_taps, image.shape[0] - top_here)
    wide = np.zeros((num_rows + num_taps, 3 * resolution), np.uint8)  # the rows, scaled; zeros behind them
    for y in range(num_rows):
        for x in range(resolution):
            at = first_column[x] - left + left_here
            red, green, blue = half, half, half
            for k in range(num_taps):
                weight = column_weight[x, k]
                if weight == 0 and k > 0:
                    break
                red += weight * image[top_here + y, at + k, 0]
                green += weight * image[top_here + y, at + k, 1]
                blue += weight * image[top_here + y, at + k, 2]
            wide[y, 3 * x], wide[y, 3 * x + 1], wide[y, 3 * x + 2] = red >> BITS, green >> BITS, blue >> BITS
    total = np.zeros(3 * resolution, np.int32)
    for y in range(resolution):
        total[:] = half
        for k in range(num_taps):
            weight = np.int32(row_weight[y, k])
            row = wide[first_row[y] - top + k]
            for i in range(3 * resolution):
                total[i] += weight * np.int32(row[i])
        for x in range(resolution):
            for channel in range(3):
                out[y, x, channel] = total[3 * x + channel] >> BITS

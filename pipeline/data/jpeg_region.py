"""Decode only a region of a JPEG, with exactly the pixels that decoding all of it gives.

Entropy-coded data can only be read from its start, and reading it takes most of the decoding time.
A *restart marker* after every MCU (a square of 8 or 16 pixels that is coded together) makes each
MCU readable by itself, for 3 to 5% more bytes and the same pixels; ``data_prep`` writes such JPEGs.
Here, the MCUs around a box become a smaller JPEG, which the library then decodes. The library
interpolates colour between neighbouring samples, hence a margin of one pixel, in whole MCUs. JPEGs
of other writers are decoded completely.

For markers and segments see ITU-T T.81, annex B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from pipeline.data.compiled import compiled_once

# functions of the C library: a loop over bytes is 20 times slower, and numba takes seconds to compile slice assignments
_memchr = types.ExternalFunction("memchr", types.int64(types.int64, types.int32, types.int64))
_memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))

MARKER, START, END, SCAN, BASELINE, INTERVAL, FIRST_RESTART = 0xFF, 0xD8, 0xD9, 0xDA, 0xC0, 0xDD, 0xD0


@compiled_once
def _byte(jpeg: Any, at: int) -> Any:
    return np.int64(jpeg[at])


@compiled_once
def _word(jpeg: Any, at: int) -> Any:
    return np.int64(jpeg[at]) << 8 | np.int64(jpeg[at + 1])


@compiled_once
def _layout(jpeg: Any) -> tuple[int, int, int, int]:
    """Return MCU height and width in pixels, and the offsets of the frame header and the entropy-coded data in bytes.

    All are 0 unless this is a baseline JPEG of one scan with a restart marker after every MCU.
    """
    refused = (0, 0, 0, 0)
    at: Any = 2
    frame, interval, mcu_height, mcu_width, num_components = 0, 0, 0, 0, 0
    if len(jpeg) < 4 or jpeg[0] != MARKER or jpeg[1] != START:
        return refused
    while at + 4 <= len(jpeg) and jpeg[at] == MARKER:
        marker, length = jpeg[at + 1], _word(jpeg, at + 2)
        body, after = at + 4, at + 2 + length
        if length < 3 or after > len(jpeg):
            return refused
        if marker == BASELINE:
            frame, num_components = at, _byte(jpeg, body + 5) if length >= 8 else 0
            if length != 8 + 3 * num_components:
                return refused
            for component in range(num_components):
                sampling = _byte(jpeg, body + 7 + 3 * component)
                mcu_width, mcu_height = max(mcu_width, 8 * (sampling >> 4)), max(mcu_height, 8 * (sampling & 15))
            if num_components == 1:  # a single component is coded in single blocks
                mcu_width, mcu_height = 8, 8
        elif marker == INTERVAL and length == 4:
            interval = _word(jpeg, body)
        elif marker == SCAN:
            is_simple = frame > 0 and interval == 1 and _byte(jpeg, body) == num_components
            return (mcu_height, mcu_width, frame, after) if is_simple and min(mcu_height, mcu_width) > 0 else refused
        at = after
    return refused


@compiled_once
def _find_mcus(jpeg: Any, start: int, num_mcus: int) -> Any:
    """Find where the data of every MCU starts, and where the marker of the last one ends: [num_mcus + 1].

    The first entry is 0 if the markers are invalid.
    """
    starts, found = np.empty(num_mcus + 1, np.int64), 0
    at: Any = start
    starts[0] = at
    base = np.int64(jpeg.ctypes.data)
    while True:
        address = _memchr(base + at, MARKER, len(jpeg) - at)
        at = address - base
        if address == 0 or at + 1 >= len(jpeg):
            break
        marker = _byte(jpeg, at + 1)
        at += 2
        if marker == 0:  # an escaped byte 255, not a marker
            continue
        found += 1
        starts[found] = at
        if found == num_mcus:
            if marker == END:
                return starts
            break
        if marker != FIRST_RESTART + (found - 1) % 8:
            break
    starts[0] = 0
    return starts


@compiled_once
def cut(jpeg: Any, height: Any, width: Any, box: tuple[int, int, int, int]) -> tuple[Any, int, int, int, int]:
    """Cut a JPEG down to a region from which the pixels of ``box`` can be decoded.

    Args:
        jpeg: uint8 [bytes].
        height: of the image in pixels.
        width: of the image in pixels.
        box: (top, left, height, width) inside the image.

    Returns:
        The smaller JPEG, and the top, left, height and width of its region; the given JPEG if it
        cannot be cut.
    """
    whole = (jpeg, 0, 0, height, width)
    mcu_height, mcu_width, frame, start = _layout(jpeg)
    if frame == 0 or _word(jpeg, frame + 5) != height or _word(jpeg, frame + 7) != width:
        return whole
    num_rows, num_columns = -(-height // mcu_height), -(-width // mcu_width)
    top, left, box_height, box_width = box
    first_row, first_column = max(top - 1, 0) // mcu_height, max(left - 1, 0) // mcu_width
    last_row = min((top + box_height) // mcu_height, num_rows - 1)
    last_column = min((left + box_width) // mcu_width, num_columns - 1)
    if (last_row - first_row + 1) * (last_column - first_column + 1) == num_rows * num_columns:
        return whole
    starts = _find_mcus(jpeg, start, num_rows * num_columns)
    if starts[0] == 0:
        return whole  # the decoder will report what is wrong

    part = np.empty(starts[num_rows * num_columns], np.uint8)
    source, target = np.int64(jpeg.ctypes.data), np.int64(part.ctypes.data)
    _memcpy(target, source, start)
    part_top, part_left = first_row * mcu_height, first_column * mcu_width
    part_height = min(height, (last_row + 1) * mcu_height) - part_top
    part_width = min(width, (last_column + 1) * mcu_width) - part_left
    part[frame + 5], part[frame + 6] = part_height >> 8, part_height & 255
    part[frame + 7], part[frame + 8] = part_width >> 8, part_width & 255
    end, num_markers = start, 0
    for row in range(first_row, last_row + 1):
        for mcu in range(row * num_columns + first_column, row * num_columns + last_column + 1):
            length = starts[mcu + 1] - starts[mcu]  # its marker included
            _memcpy(target + end, source + starts[mcu], length)
            end += length
            part[end - 1] = FIRST_RESTART + num_markers % 8
            num_markers += 1
    part[end - 1] = END
    return part[:end], part_top, part_left, part_height, part_width

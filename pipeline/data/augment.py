"""FFCV decoders in which crop and flip are a pure function of (seed, epoch, sample): no generator, no state, nothing to save.

Random numbers are counter-based: ``uniform(stream, draw)`` hashes (key, sample, draw) with splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
The key stands for (seed, epoch) and reaches the compiled decoder in ``storage_state``, which ffcv passes at every call: an array in a
closure would be frozen when the decoder is compiled, so a new epoch needs no new compilation (see ``loaders.Epoch``).

A *placement* decides what of a decoded image ends up in the output: ``place(image, stream, out)`` with ``image: [height, width, 3]`` and
``out: [resolution, resolution, 3]``, both uint8. Draw 0 of a sample is its flip, the draws from 1 on belong to the placement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit

from pipeline.errors import DataError


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Put torch's number of threads back: ffcv sets it to one when imported and to its own number of workers when a loader is made."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


with keep_torch_threads():
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

F = TypeVar("F", bound=Callable[..., Any])
Place = Callable[[Any, Any, Any], None]

PADDING = 4
NUM_ATTEMPTS = 10
LOG_RATIO_LOW, LOG_RATIO_HIGH = math.log(3 / 4), math.log(4 / 3)


def compiled(function: F) -> F:
    """Compile with numba. Without its fastmath, which ffcv uses: the crop of a sample must not depend on how a loop was vectorised."""
    return cast(F, njit(nogil=True, error_model="numpy")(function))


_imdecode = compiled(imdecode)
_resize_crop = compiled(resize_crop)

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


def random_crop_box(min_scale: float) -> Callable[[int, int, np.uint64], tuple[int, int, int, int]]:
    """``box(height, width, stream) -> (top, left, height, width)`` with the distribution of torchvision's ``RandomResizedCrop``.

    Area uniform in [min_scale, 1] of the image, log-uniform aspect ratio in [3/4, 4/3]; after ten boxes that do not fit, the largest
    centred one with an allowed ratio.
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


def random_resized_crop(min_scale: float) -> Place:
    """Place a random box, resized to the output as ffcv does (OpenCV's area interpolation)."""
    box = random_crop_box(min_scale)

    @compiled
    def place(image: Any, stream: np.uint64, out: Any) -> None:
        top, left, height, width = box(image.shape[0], image.shape[1], stream)
        _resize_crop(image, top, top + height, left, left + width, out)

    return place


def centre_crop(ratio: float) -> Place:
    """Place the centred square of side ``ratio`` times the shorter side, resized to the output.

    With ratio 1 and square images of the output's size the pixels are copied unchanged.
    """

    @compiled
    def place(image: Any, stream: np.uint64, out: Any) -> None:
        height, width = image.shape[0], image.shape[1]
        side = max(1, int(ratio * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        _resize_crop(image, top, top + side, left, left + side, out)

    return place


def pad_crop(fill: Sequence[float]) -> Place:
    """Place a random window of the image padded by 4 pixels on each side (CIFAR); images have the output's size.

    ``fill`` (one value a channel, 0–255) is rounded to whole pixel values. With the data set's mean the padding is zero after
    normalisation, up to that rounding: at most 0.5 / std. (In the authors' code CIFAR-100 is padded with black, CIFAR-10 by reflection.)
    """
    border = np.array([round(value) for value in fill], dtype=np.uint8)

    @compiled
    def place(image: Any, stream: np.uint64, out: Any) -> None:
        height, width = out.shape[0], out.shape[1]
        down = int(uniform(stream, 1) * (2 * PADDING + 1)) - PADDING
        right = int(uniform(stream, 2) * (2 * PADDING + 1)) - PADDING
        for row in range(height):
            for column in range(width):
                is_inside = 0 <= row + down < height and 0 <= column + right < width
                for channel in range(3):
                    out[row, column, channel] = image[row + down, column + right, channel] if is_inside else border[channel]

    return place


@compiled
def mirror(image: Any) -> None:
    """Flip an image horizontally, in place."""
    height, width = image.shape[0], image.shape[1]
    for row in range(height):
        for left in range(width // 2):
            right = width - 1 - left
            for channel in range(3):
                image[row, left, channel], image[row, right, channel] = image[row, right, channel], image[row, left, channel]


class KeyedDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode an ``RGBImageField`` (JPEG or raw) to uint8 ``[batch, resolution, resolution, 3]``, placed and perhaps flipped.

    ``storage_state`` must be ``(ffcv's own state, key: uint64, damaged: int64[1])``. A JPEG that cannot be decoded leaves its sample id in
    ``damaged``: ffcv itself would go on with whatever the buffer held before, another sample's pixels.
    """

    def __init__(self, resolution: int, place: Place, *, flip: bool, needs_resolution: bool = False) -> None:
        super().__init__()
        self.resolution = resolution
        self.place = place
        self.flip = flip
        self.needs_resolution = needs_resolution  # the placement does not resize

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        sides = {int(side) for name in ("height", "width") for side in np.unique(self.metadata[name])}
        if self.needs_resolution and sides != {self.resolution}:
            raise DataError(
                f"pad_crop_flip needs images of {self.resolution} pixels a side: these have {min(sides)} to {max(sides)}",
                do="set data.train_resolution to the size of the images, or choose another data.augmentation",
            )
        shape, dtype = (self.resolution, self.resolution, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        place, is_flipping, read = self.place, self.flip, self.memory_read
        jpeg, batch_range = IMAGE_MODES["jpg"], Compiler.get_iterator()

        @compiled
        def decode_one(field: Any, sample: int, memory: Any, damaged: Any) -> Any:
            data = read(field["data_ptr"], memory)
            height, width = np.int64(field["height"]), np.int64(field["width"])
            if field["mode"] != jpeg:
                return data.reshape(height, width, 3)
            # one buffer a time, reused by the allocator: ffcv keeps one of the largest image's size for every sample of every slot
            image = np.empty((height, width, 3), np.uint8)
            if _imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                damaged[0] = sample
            return image

        def decode(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            memory, key, damaged = storage_state
            for slot in batch_range(len(batch_indices)):
                sample = batch_indices[slot]
                stream = sample_stream(key, sample)
                out = destination[slot]
                place(decode_one(metadata[sample], sample, memory, damaged), stream, out)
                if is_flipping and uniform(stream, 0) < 0.5:
                    mirror(out)
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode

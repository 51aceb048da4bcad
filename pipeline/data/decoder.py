"""ffcv's image decoder with our crops and flips, decoding no more of a JPEG than necessary."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from llvmlite import binding
from numba import types

from pipeline.data.augment import Augmentation, place_of, sample_stream, uniform
from pipeline.data.code_cache import kept_on_disk
from pipeline.data.compiled import compiled
from pipeline.data.ffcv_import import importing_ffcv
from pipeline.data.jpeg_region import cut
from pipeline.errors import DataError

with importing_ffcv():
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

# ffcv's C function by a name instead of its address, which differs from process to process: code that
# contains an address cannot be kept on disk
binding.add_symbol("ticketworks_imdecode", ctypes.cast(ctypes_imdecode, ctypes.c_void_p).value)
_imdecode = types.ExternalFunction(
    "ticketworks_imdecode",
    # input, its bytes; height and width; output; height, width, top and left of the crop; scale; two switches
    types.int32(
        *(types.uintp, types.uint64, types.uint32, types.uint32, types.uintp),
        *(types.uint32,) * 8,
    ),
)


@compiled
def _decode_jpeg(data: Any, image: Any, height: int, width: int) -> int:
    """Decode ``data`` to ``image``, uint8 [height, width, 3]; return 0, or anything else if it is damaged."""
    status: int = _imdecode(
        data.ctypes.data, data.size, height, width, image.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
    )
    return status


class KeyedDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode an ``RGBImageField`` (JPEG or raw) to uint8 ``[batch, resolution, resolution, 3]``.

    Images are cropped, resized and perhaps flipped. ``resolution`` may change between epochs
    without a new compilation.

    ``storage_state`` must be ``(ffcv's own state, key: uint64, damaged: int64[1])``: ffcv passes it
    with every call, whereas an array in a closure would be frozen when the decoder is compiled. A
    JPEG that cannot be decoded leaves its sample id in ``damaged``; ffcv itself would continue with
    the previous content of the buffer, another sample's pixels.
    """

    def __init__(self, resolution: int, augmentation: Augmentation) -> None:
        super().__init__()
        self.resolution = resolution
        self.augmentation = augmentation

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        """Give ffcv the shape of the output, and check the size of the images for ``pad_crop_flip``.

        Raises:
            DataError: the images do not have the configured size.
        """
        if self.augmentation.fill is not None:
            sides = {int(side) for name in ("height", "width") for side in np.unique(self.metadata[name])}
            if sides != {self.resolution}:
                raise DataError(
                    f"data.augmentation=pad_crop_flip: expected images with sides of {self.resolution} pixels, "
                    f"got {min(sides)} to {max(sides)}",
                    do="set data.train_resolution to the size of the images, or choose another data.augmentation",
                )
        shape, dtype = (self.resolution, self.resolution, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that ffcv compiles and calls for every batch."""
        box, is_flipping, read = self.augmentation.box, self.augmentation.flip, self.memory_read
        place = compiled(place_of(self.augmentation))
        jpeg, batch_range = IMAGE_MODES["jpg"], Compiler.get_iterator()

        @kept_on_disk
        @compiled
        def decode_one(field: Any, sample: int, memory: Any, key: np.uint64, damaged: Any, out: Any) -> None:
            stream = sample_stream(key, sample)
            is_flipped = is_flipping and uniform(stream, 0) < 0.5
            data = read(field["data_ptr"], memory)
            height: Any = np.int64(field["height"])
            width: Any = np.int64(field["width"])
            size, needed = (height, width), box(height, width, stream)
            part: Any = (0, 0)
            if field["mode"] == jpeg:
                data, part_top, part_left, height, width = cut(data, height, width, needed)
                # one buffer at a time, reused by the allocator; ffcv would keep one of the largest
                # image's size for every sample of every slot
                image = np.empty((height, width, 3), np.uint8)
                if _decode_jpeg(data, image, height, width) != 0:
                    damaged[0] = sample
                part = (part_top, part_left)
            else:
                image = data.reshape(height, width, 3)
            # the only call of place, because each takes another second to compile
            place(image, part, size, needed, stream, is_flipped, out)

        def decode(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
            # unpacked outside the loop: numba cannot pass a tuple of tuples into a parallel loop
            memory, key, damaged = storage_state
            for slot in batch_range(len(batch_indices)):
                sample = batch_indices[slot]
                decode_one(metadata[sample], sample, memory, key, damaged, destination[slot])
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode

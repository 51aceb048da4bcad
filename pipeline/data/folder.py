"""Batches read directly from image files (``class/image``, as torchvision's ImageFolder), without ffcv.

A reference for the loader of .beton files, and enough for small data sets. Order, crops, flips and
resizing are the same as for a .beton file written from the folder; images are read as strictly as
``data_prep`` reads them, with the same functions, and JPEGs are decoded by Pillow.
Images are decoded by ``num_workers`` threads, which need no shared memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment import Augmentation, place_of, sample_stream, uniform
from pipeline.datasets.folder_listing import list_images
from pipeline.datasets.image_file import BadImage, ImageFile, decode_rgb, read_content
from pipeline.errors import DataError

BATCHES_AHEAD = 3
REPAIR = (
    "repair or remove it; python -m data_prep image-folder lists all unusable images and writes nothing if there are"
)
WAIT = "raise data.batch_timeout_seconds, or check the storage that holds the images"


class FolderSource:
    """The images of one folder, cropped and resized; see :class:`pipeline.data.loaders.ImageSource`."""

    def __init__(
        self, path: Path, augmentation: Augmentation, *, resolution: int, num_workers: int, timeout_seconds: float
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._augmentation = augmentation
        self._place = place_of(augmentation)
        self._num_workers = num_workers
        self.switch_to(path)

    def switch_to(self, path: Path) -> None:
        """Read another folder from now on."""
        self.path = path
        _, self._images = list_images(path)
        self.num_samples = len(self._images)

    def blocks(self) -> NDArray[np.int64]:
        """Return a block of its own for every file."""
        return np.arange(self.num_samples, dtype=np.int64)

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images [n, 3, resolution, resolution] and labels [n] of ``order``; see ``ImageSource``.

        ``reads_ahead`` is ignored.
        """
        stream_of = np.uint64(key & (2**64 - 1))
        pool = ThreadPoolExecutor(self._num_workers)
        parts = iter([order[start : start + batch] for start in range(0, len(order), batch)])
        running: deque[list[Future[tuple[NDArray[np.uint8], int]]]] = deque()

        def start_next() -> None:
            for part in parts:
                running.append([pool.submit(self._load, int(sample), stream_of, resolution) for sample in part])
                return

        try:
            for _ in range(BATCHES_AHEAD):
                start_next()
            while running:
                deadline = time.monotonic() + self.timeout_seconds
                try:
                    loaded = [
                        future.result(timeout=max(0.0, deadline - time.monotonic())) for future in running.popleft()
                    ]
                except FutureTimeout:
                    raise DataError(f"no batch came within {self.timeout_seconds:g} seconds", do=WAIT) from None
                start_next()
                images = torch.from_numpy(np.stack([image for image, _ in loaded])).permute(0, 3, 1, 2)
                yield images, torch.tensor([label for _, label in loaded])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, sample: int, key: np.uint64, resolution: int) -> tuple[NDArray[np.uint8], int]:
        path, label = self._images[sample]
        name = f"{path.parent.name}/{path.name}"
        try:
            image = decode_rgb(read_content(ImageFile(path)))
        except BadImage as error:
            raise DataError(f"{name} (sample {sample}) {error}", do=REPAIR) from error
        stream = np.uint64(sample_stream(key, sample))
        is_flipped = self._augmentation.flip and uniform(stream, 0) < 0.5
        out = np.empty((resolution, resolution, 3), np.uint8)
        if self._augmentation.fill is not None and image.shape != out.shape:
            raise DataError(
                f"{name}: data.augmentation=pad_crop_flip: expected an image with sides of {resolution} pixels, "
                f"got {image.shape[0]}×{image.shape[1]}",
                do="set data.train_resolution to the size of the images, or choose another data.augmentation",
            )
        size = (image.shape[0], image.shape[1])
        self._place(image, (0, 0), size, self._augmentation.box(*size, stream), stream, is_flipped, out)
        return out, label

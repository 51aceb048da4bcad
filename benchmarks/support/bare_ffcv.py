"""FFCV as its users know it, the reference for our loader: its JPEGs, its crop and flip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from pipeline.data.decoder import keep_torch_threads

with keep_torch_threads():
    from ffcv.fields import RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

# Every new loader of ffcv marks a type of numba as read-only. That type is part of the key of
# functions that were compiled for an earlier loader: if these were deleted, numba would not find
# them and print tracebacks. So they are kept.
_kept: list[Loader] = []


def write_as_ffcv(write: Callable[[], object]) -> None:
    """Call ``write``, with every JPEG compressed as by ffcv's own writer."""
    with patch("data_prep.writer.PartialField", RGBImageField):
        write()


def batches_of(
    path: Path, *, batch: int, num_workers: int, resolution: int
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Return a function that iterates over the uint8 images and labels of one epoch."""
    with keep_torch_threads():
        image = [
            RandomResizedCropRGBImageDecoder((resolution, resolution)),
            RandomHorizontalFlip(),
            ToTensor(),
            ToTorchImage(),
        ]
        pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]}
        loader = Loader(
            str(path),
            batch_size=batch,
            num_workers=num_workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            seed=0,
            drop_last=True,
            pipelines=pipelines,
        )
    _kept.append(loader)

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        with keep_torch_threads():
            yield from loader

    return epoch

"""FFCV as its users know it, the reference for our loader: its JPEGs, its crop and flip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from pipeline.data.ffcv_import import importing_ffcv, keep_torch_threads
from pipeline.data.ffcv_source import FileLoader

with importing_ffcv():
    from ffcv.fields import RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage


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
        loader = FileLoader(  # ffcv's loader, which leaves numba's types alone: ours is timed in the same process
            str(path),
            batch_size=batch,
            num_workers=num_workers,
            order=OrderOption.RANDOM,
            os_cache=True,
            seed=0,
            drop_last=True,
            pipelines=pipelines,
        )

    def epoch() -> Iterator[tuple[Tensor, Tensor]]:
        with keep_torch_threads():
            yield from loader

    return epoch

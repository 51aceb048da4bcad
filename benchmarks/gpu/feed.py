"""Part ``feed``: images on their way to the device, alone and while a network trains; and their source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu import loop
from benchmarks.gpu.loop import Trainer, interleaved, on_device, ratio
from benchmarks.gpu.report import Options, Report
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import EvalLoader, TrainLoader
from pipeline.distributed import session

IMAGES_PER_SECOND = 8000
OVERLAP = 1.01  # a step whose images come from the loader / one whose images are on the device
LARGEST = 2e-6  # difference of a normalised pixel: a GPU rounds its last bits otherwise
NUM_SLOTS = 5  # buffers of the source, which writes to them again, as FFCV does


class Images:
    """Images in memory as a source of the loaders; see :class:`pipeline.data.loaders.ImageSource`.

    Args:
        images: uint8 [n, side, side, 3].
        labels: int64 [n].
        num_samples: size of the set; None: that of ``images``. A larger one is a set whose sample i is
            image i mod n, and whose buffers are filled only once, to measure what comes after.
    """

    path, timeout_seconds = Path("memory"), 60.0

    def __init__(self, images: Tensor, labels: Tensor, *, num_samples: int | None = None) -> None:
        self._images, self._labels = images, labels
        self._is_filled_once = num_samples is not None
        self.num_samples = num_samples or len(images)

    @classmethod
    def made(cls, num_images: int, side: int, *, num_classes: int = 10, num_samples: int | None = None) -> Images:
        """Return made-up images."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (num_images, side, side, 3), dtype=torch.uint8, generator=generator)
        return cls(images, torch.randint(0, num_classes, (num_images,), generator=generator), num_samples=num_samples)

    def blocks(self) -> NDArray[np.int64]:
        """Return a block of its own for every image."""
        return np.arange(self.num_samples, dtype=np.int64)

    def switch_to(self, path: Path) -> None:
        """Refuse: made-up images are one set."""
        raise AssertionError(f"made-up images have no other set such as {path}")

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches; images are pinned on a machine with a GPU, and are not changed by augmentation."""
        is_pinned = session.device().type == "cuda"
        shape = (NUM_SLOTS, batch, *self._images.shape[1:])
        buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)
        labels = torch.empty((NUM_SLOTS, batch), dtype=torch.int64, pin_memory=is_pinned)
        for index, start in enumerate(range(0, len(order), batch)):
            ids = torch.from_numpy(order[start : start + batch]) % len(self._images)
            slot = index % NUM_SLOTS
            if index < NUM_SLOTS or not self._is_filled_once:
                torch.index_select(self._images, 0, ids, out=buffers[slot, : len(ids)])
                torch.index_select(self._labels, 0, ids, out=labels[slot, : len(ids)])
            yield buffers[slot, : len(ids)].permute(0, 3, 1, 2), labels[slot, : len(ids)]


def settings_of(source: Images) -> dict[str, Any]:
    side = int(source._images.shape[1])
    return {"data": DataConfig(train="memory", val="memory", train_resolution=side, eval_resolution=side)}


def loader_of(
    source: Images, *, num_images: int, device: torch.device | None = None, dtype: str = "fp32"
) -> TrainLoader:
    """Return the loader of training images of a source, on the session's device unless given."""
    placing: dict[str, Any] = {"device": device or session.device(), "channels_last": True, "dtype": loop.DTYPES[dtype]}
    return TrainLoader(source, **settings_of(source), global_batch=num_images, seed=0, **placing)


def eval_loader_of(source: Images, *, batch: int, device: torch.device | None = None) -> EvalLoader:
    """Return the loader of a source for evaluation, on the session's device unless given."""
    at = device or session.device()
    return EvalLoader(source, **settings_of(source), batch=batch, device=at, channels_last=True)


def feed(given: Options, report: Report) -> None:
    """Compare pixels with the CPU's; time the way to the device alone, and a step with and without it."""
    pixels, num_images = loop.side(given), max(loop.batch_sizes(given))
    with on_device(given):
        require_same_pixels(report, pixels)
        source = Images.made(num_images * NUM_SLOTS, pixels, num_classes=1000, num_samples=num_images * 10_000)
        batches = loader_of(source, num_images=num_images, dtype=loop.precision(given)).steps(0, 10**9)
        next(batches)
        alone = interleaved({"feed": lambda: next(batches)}, report, until=0.2)["feed"]
        rates = [1000 * num_images / ms for ms in alone]
        rate = float(np.median(rates))
        report.at_least("images/s of the feed alone", rate, IMAGES_PER_SECOND, f"{rate:.0f}")
        images, labels = loop.batch(given, num_images, pixels, dtype=loop.precision(given))
        ours = Trainer(loop.network(given), num_images=num_images, precision=loop.precision(given), check_every=0)
        times = interleaved(
            {
                "with": lambda: ours.step(*next(batches)[1]),
                "without": lambda: ours.step(images, labels),
            },
            report,
            until=1.0,
        )
        value, text = ratio(times["with"], times["without"])
        report.at_most(f"step with / without feed, {num_images}", value, OVERLAP, text)
        batches.close()  # type: ignore[attr-defined]


def require_same_pixels(report: Report, pixels: int) -> None:
    """Compare all batches of an epoch, whose buffers are written again, with those of the CPU."""
    source = Images.made(40, pixels)
    cpu = loader_of(source, num_images=4, device=torch.device("cpu"))
    here = loader_of(source, num_images=4)
    num_wrong, worst = 0, 0.0
    for (_, (images, labels)), (_, (others, other_labels)) in zip(cpu.steps(0, 20), here.steps(0, 20), strict=True):
        error = float((images - others.cpu()).abs().max())
        num_wrong += error > LARGEST or not torch.equal(labels, other_labels.cpu())
        worst = max(worst, error)
    text = f"{num_wrong} of 20 batches differ from the CPU's; largest difference {worst:.1e}"
    report.check("pixels", num_wrong == 0, text, f"within {LARGEST:g}, which is rounding", largest=worst)

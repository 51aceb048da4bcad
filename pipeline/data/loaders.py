"""The loaders for training, recalibration and evaluation, with reproducible order and pixels.

The samples of a step are the same on any number of ranks (module ``order``), and their pixels are a
function of (seed, epoch, sample) (module ``augment``). Pixels come from an :class:`ImageSource`: a
.beton file, or a folder of images, which needs no ffcv.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.config.schema import DataConfig
from pipeline.data.augment import Augmentation, evaluation_augmentation, training_augmentation
from pipeline.data.normalise import normalise
from pipeline.data.order import (
    block_order,
    epoch_order,
    eval_share,
    evenly_spread,
    mixing_shares,
    recalibration_share,
    stream_key,
    train_share,
)
from pipeline.data.resolution import resolution_of
from pipeline.distributed.session import rank, world_size
from pipeline.errors import ConfigError, DataError
from pipeline.limits import loader_threads

logger = logging.getLogger(__name__)

NOT_PINNED = (
    "its batches are not in pinned memory, so that training waits for every copy to the GPU; "
    "do: raise the limit of locked memory (ulimit -l), with data.loader=folder prepare FFCV files"
)
HINT = (
    "check the file with python -m data_prep verify; "
    "if the file is intact, raise data.batch_timeout_seconds or check the storage"
)


class ImageSource(Protocol):
    """Images and labels by sample id."""

    path: Path
    num_samples: int
    timeout_seconds: float  # a batch must arrive within this time

    def blocks(self) -> NDArray[np.int64]:
        """Return the block of every sample, [num_samples]; samples of a block are adjacent on disk."""

    def switch_to(self, path: Path) -> None:
        """Read another set of the same kind from now on."""

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images (uint8 [n, 3, resolution, resolution], NHWC in memory) and labels ([n] or [n, 1]).

        A batch is valid until the next one is requested.

        Args:
            order: the sample ids.
            batch: number of samples per batch; the last batch may be smaller.
            key: the random stream of crops and flips, made from (seed, epoch).
            resolution: side of the images, in pixels.
            reads_ahead: read blocks as a whole, shortly before their first sample is needed.

        Raises:
            DataError: a batch does not arrive in time, or is damaged.
        """


def open_source(path: Path, data: DataConfig, augmentation: Augmentation, *, resolution: int) -> ImageSource:
    """Open the kind of source that ``data.loader`` names.

    Raises:
        DataError: ``path`` does not exist, or is of the other kind.
    """
    if path.is_dir() != (data.loader == "folder") and path.exists():
        kind, loader = ("a folder", "folder") if path.is_dir() else ("a file", "ffcv")
        raise DataError(
            f"{path}: is {kind}, but data.loader is {data.loader!r}",
            do=f"set data.loader={loader}, or correct the path",
        )
    settings: dict[str, Any] = {
        "resolution": resolution,
        "num_workers": loader_threads(data.num_workers),
        "timeout_seconds": data.batch_timeout_seconds,
    }
    if data.loader == "folder":
        from pipeline.data.folder import FolderSource

        return FolderSource(path, augmentation, **settings)
    from pipeline.data.ffcv_source import FfcvSource  # here, because it takes 4 s and ffcv may not be installed

    return FfcvSource(path, augmentation, **settings)


class _Loader:
    """Moves the batches of one source to the device, and normalises them to ``dtype``."""

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        *,
        device: torch.device,
        channels_last: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seconds_waited = 0.0
        self.num_samples = source.num_samples
        self._source = source
        self._rank, self._world_size = rank(), world_size()
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._dtype = dtype
        self._mean_and_std = data.mean, data.std
        self._is_pinned: bool | None = None  # None: not looked at yet
        self._laid_out: dict[int, tuple[Tensor, Tensor]] = {}

    def _batches(
        self,
        order: NDArray[np.int64],
        *,
        batch: int,
        key: int,
        resolution: int,
        name: str,
        first: int = 0,
        reads_ahead: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels of ``order``, on the device.

        ``name`` and ``first``, the number of the first batch, are for error messages.
        """
        source = self._source
        with closing(
            source.batches(order, batch=batch, key=key, resolution=resolution, reads_ahead=reads_ahead)  # type: ignore[type-var]
        ) as batches:
            received = self._received(batches, math.ceil(len(order) / batch), name=name, first=first)
            for images, labels in received if self._device.type == "cpu" else self._copied_ahead(received):
                yield self._normalised(images, resolution), labels

    def _received(
        self, batches: Iterator[tuple[Tensor, Tensor]], number: int, *, name: str, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``number`` batches of the source, and say of an error which batch it was."""
        for index in range(number):
            started = time.perf_counter()
            try:
                images, labels = next(batches)
            except DataError as error:
                waited = f"after {time.perf_counter() - started:.1f} seconds"
                what = f"{self._source.path}: {name}, batch {first + index}: {error.what}, {waited}"
                raise DataError(what, do=error.do or HINT) from error
            self.seconds_waited += time.perf_counter() - started
            if self._is_pinned is None and self._device.type == "cuda":
                self._is_pinned = images.is_pinned()
                if not self._is_pinned:
                    logger.warning("%s: rank %d: %s", self._source.path, self._rank, NOT_PINNED)
            labels = labels.view(-1)
            yield images, labels.clone() if self._device.type == "cpu" else labels

    def _copied_ahead(self, received: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on the GPU. The next one is copied meanwhile, in a stream of its own.

        An error is raised when its batch is due.
        """
        copying, failure = torch.cuda.Stream(self._device), None  # type: ignore[no-untyped-call]
        batch: list[Tensor] = []
        copied: torch.cuda.Event | None = None
        while True:
            following: list[Tensor] = []
            try:
                with torch.cuda.stream(copying):
                    following = [part.to(self._device, non_blocking=True) for part in next(received, ())]
            except DataError as error:
                failure = error
            if copied is not None:
                computing = torch.cuda.current_stream(self._device)
                computing.wait_event(copied)
                for part in batch:
                    part.record_stream(computing)  # its memory belongs to the other stream
                yield batch[0], batch[1]
            if failure is not None:
                raise failure
            if not following:
                return
            batch, copied = following, copying.record_event()
            # then the source may use the buffers from which this batch was copied again
            copied.synchronize()

    def _normalised(self, images: Tensor, resolution: int) -> Tensor:
        """Return (images - mean) / std: on a GPU in one pass, which rounds the last bit otherwise."""
        if self._device.type == "cpu":
            return normalise(images, *self._laid_out_as(resolution, *self._mean_and_std))
        means, stds = self._mean_and_std
        shifts = [-mean / std for mean, std in zip(means, stds, strict=True)]
        shift, scale = self._laid_out_as(resolution, shifts, [1 / std for std in stds])
        out = torch.empty(images.shape, dtype=self._dtype, device=self._device, memory_format=self._memory_format)
        return torch.addcmul(shift, images, scale, out=out)  # in float32, from bytes to ``dtype``

    def _laid_out_as(self, resolution: int, *of_channels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return two numbers per channel, expanded to the shape and memory format of one image.

        Broadcasting over a short innermost dimension would be six times slower.
        """
        if resolution not in self._laid_out:
            laid_out = [
                torch.tensor(values, device=self._device, dtype=torch.float32)
                .view(1, 3, 1, 1)
                .expand(1, 3, resolution, resolution)
                .contiguous(memory_format=self._memory_format)
                for values in of_channels
            ]
            self._laid_out[resolution] = laid_out[0], laid_out[1]
        return self._laid_out[resolution]


class TrainLoader(_Loader):
    """Training batches by global step, and micro-batches for the recalibration of BatchNorm.

    Attributes:
        num_samples: number of samples in the set.
        steps_per_epoch: number of full global batches; the remaining samples of an epoch are dropped.
        seconds_waited: time spent waiting for data; callers may reset it to zero.
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        *,
        global_batch: int,
        seed: int,
        num_classes: int | None = None,
        **placing: Any,
    ) -> None:
        super().__init__(source, data, **placing)
        self.steps_per_epoch = self.num_samples // global_batch
        self._global_batch, self._seed = global_batch, seed
        self._data, self._num_classes = data, num_classes
        self._blocks = self._window = None
        if data.order == "quasi_random":
            self._blocks = source.blocks()
            self._window = window_of(self._blocks, data, set_bytes=source.path.stat().st_size)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{source.path} has {self.num_samples} samples, fewer than one global batch of {global_batch}",
                do="lower train.global_batch",
            )
        if global_batch % self._world_size:
            raise ConfigError(
                f"train.global_batch {global_batch} is not divisible by the number of ranks, {self._world_size}",
                do=f"choose a multiple of {self._world_size}",
            )
        if data.mixup and (global_batch // self._world_size) % 2:
            raise ConfigError(
                "data.mixup: mixes pairs, expected an even number of samples per rank and step, "
                f"got {global_batch // self._world_size}",
                do=f"set train.global_batch to a multiple of {2 * self._world_size}",
            )

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield ``(step, (images, labels))`` for the steps from ``start`` to ``stop`` - 1 of the run.

        Images and labels are this rank's part of the global batch. Images are normalised, in the
        loader's dtype, ``[batch, 3, resolution, resolution]``; labels are int64 ``[batch]``, with ``data.mixup``
        float32 ``[batch, classes]``. The epoch is ``step // steps_per_epoch``. No sample before
        ``start`` is decoded.
        """
        step = start
        while step < stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            share = train_share(
                self._epoch_order(epoch), global_batch=self._global_batch, rank=self._rank, world_size=self._world_size
            )[first : first + stop - step]
            batches = self._batches(
                share.reshape(-1),
                batch=share.shape[1],
                key=stream_key("augmentation", self._seed, epoch),
                resolution=resolution_of(epoch, self._data),
                name=f"epoch {epoch}",
                first=first,
                reads_ahead=self._blocks is not None,
            )
            with closing(batches):  # type: ignore[type-var]
                for batch in batches:
                    yield step, self._mix(*batch, step=step) if self._data.mixup else batch
                    step += 1

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._blocks is None or self._window is None:
            return epoch_order(self._seed, epoch, self.num_samples)
        return block_order(self._seed, epoch, self._blocks, window=self._window)

    def _mix(self, images: Tensor, labels: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Mix neighbours in the global batch (mixup, arXiv 1710.09412); ranks need not exchange samples."""
        assert self._num_classes is not None
        whole = mixing_shares(self._seed, step, self._global_batch, alpha=self._data.mixup)
        here = whole.reshape(self._world_size, -1)[self._rank]
        share = torch.from_numpy(here).to(self._device, torch.float32, non_blocking=True).view(-1, 1)
        partner = torch.arange(len(images), device=self._device) ^ 1
        targets = one_hot(labels, self._num_classes).to(torch.float32)
        mixed = torch.lerp(images[partner], images, share.view(-1, 1, 1, 1))
        return mixed.contiguous(memory_format=self._memory_format), torch.lerp(targets[partner], targets, share)

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterator[Tensor]:
        """Yield augmented training images for recalibration, ``[batch, 3, resolution, resolution]`` each.

        Micro-batch i consists of samples ``[i * batch, (i + 1) * batch)`` of an order keyed by
        ``seed``, whatever the number of ranks; this rank yields those with i mod world_size = rank.
        There are at most num_samples // batch micro-batches. The resolution is that of the last
        epochs, ``data.train_resolution``.
        """
        share = recalibration_share(
            seed, self.num_samples, batch=batch, num_batches=num_batches, rank=self._rank, world_size=self._world_size
        )
        key, resolution = stream_key("recalibration", seed), self._data.train_resolution
        batches = self._batches(share.reshape(-1), batch=batch, key=key, resolution=resolution, name="recalibration")
        with closing(batches):  # type: ignore[type-var]
            for images, _ in batches:
                yield images


class EvalLoader(_Loader):
    """The samples of a set for evaluation, each exactly once over all ranks.

    With ``num_images`` only so many are read, evenly spaced over the set; their ids count from 0.

    Attributes:
        num_samples: number of samples that are read, over all ranks.
        seconds_waited: time spent waiting for data.
    """

    def __init__(
        self, source: ImageSource, data: DataConfig, *, batch: int, num_images: int | None = None, **placing: Any
    ) -> None:
        super().__init__(source, data, **placing)
        self._batch, self._resolution = batch, data.eval_resolution
        self._samples = evenly_spread(self.num_samples, num_images)
        self.num_samples = len(self._samples)

    @property
    def num_batches(self) -> int:
        """Number of batches of the rank that has the most; another rank may have one less."""
        return math.ceil(math.ceil(self.num_samples / self._world_size) / self._batch)

    def subset(self, num_images: int) -> EvalLoader:
        """Return a loader of ``num_images`` of these images, evenly spread, which reads the same source."""
        part = copy.copy(self)
        part._samples = self._samples[evenly_spread(self.num_samples, num_images)]
        part.num_samples = len(part._samples)
        return part

    def switch_to(self, path: Path) -> None:
        """Read another set from now on, all of it."""
        self._source.switch_to(path)
        self.num_samples = self._source.num_samples
        self._samples = evenly_spread(self.num_samples, None)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's share as ``(sample ids, images, labels)``, on the device.

        Ids and labels are int64 ``[n]``, images are normalised, float32 ``[n, 3, resolution,
        resolution]``. n is the batch size, except that the last batch may be smaller. A rank may
        have no batch at all.
        """
        share = eval_share(self.num_samples, rank=self._rank, world_size=self._world_size)
        ids = torch.from_numpy(share).to(self._device)
        batches = self._batches(
            self._samples[share], batch=self._batch, key=0, resolution=self._resolution, name="evaluation"
        )
        with closing(batches):  # type: ignore[type-var]
            for index, (images, labels) in enumerate(batches):
                yield ids[index * self._batch : (index + 1) * self._batch], images, labels


def window_of(blocks: NDArray[np.int64], data: DataConfig, *, set_bytes: int) -> int:
    """Return how many blocks of the set fit into ``data.window_mb``, at least one."""
    num_blocks = len(np.unique(blocks))
    return max(1, min(num_blocks, int(data.window_mb * 2**20 * num_blocks / set_bytes)))


def open_train_loader(
    path: Path,
    data: DataConfig,
    *,
    global_batch: int,
    seed: int,
    device: torch.device,
    channels_last: bool,
    num_classes: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> TrainLoader:
    """Open the loader of a training set for this rank.

    ``global_batch`` is the number of samples per step over all ranks; mixup needs ``num_classes``.
    Where forward passes are autocast to ``autocast_dtype``, a GPU makes images of that type, as autocast
    would of float32; mixup mixes in float32.
    """
    is_cast = device.type == "cuda" and autocast_dtype is not None and not data.mixup
    source = open_source(path, data, training_augmentation(data), resolution=data.train_resolution)
    return TrainLoader(
        source,
        data,
        global_batch=global_batch,
        seed=seed,
        num_classes=num_classes,
        device=device,
        channels_last=channels_last,
        dtype=autocast_dtype if is_cast else torch.float32,
    )


def open_eval_loader(
    path: Path,
    data: DataConfig,
    *,
    batch: int,
    device: torch.device,
    channels_last: bool,
    num_images: int | None = None,
) -> EvalLoader:
    """Open the loader of a set for evaluation, with a centre crop.

    The crop has ``data.eval_ratio`` times the shorter side, and is resized to ``data.eval_resolution``.
    """
    source = open_source(path, data, evaluation_augmentation(data), resolution=data.eval_resolution)
    return EvalLoader(source, data, batch=batch, num_images=num_images, device=device, channels_last=channels_last)

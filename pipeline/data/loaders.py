"""FFCV behind our own loaders: training, recalibration and evaluation, exact in order and pixels, and never a silent wait.

* The samples of a step are the same on any number of ranks; their pixels are a function of (seed, epoch, sample): ``order``, ``augment``.
* A loader compiles its decoder once per process, in the first batch (seconds); training and recalibration share one.
* ffcv waits for ever when its worker thread dies. Here a batch that does not come in time, a dead worker and an image that cannot be
  decoded are each a :class:`DataError`.
* Threads: ``num_workers`` threads decode. Importing ffcv sets torch to one thread, and every loader and epoch of ffcv set it to
  ``num_workers``; here torch's number of threads is always put back to what it was, so the session decides it.
* Files are read through the page cache. ffcv's other reader keeps every page from its first to its last use, which in a random order is
  the whole file, in private memory of each rank.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data import augment
from pipeline.data.augment import KeyedDecoder, keep_torch_threads
from pipeline.data.order import epoch_order, eval_share, evenly_spread, recalibration_share, stream_key, train_share
from pipeline.distributed.session import rank, world_size
from pipeline.errors import ConfigError, DataError
from pipeline.schema import DataConfig

with keep_torch_threads():
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor, ToTorchImage

log = logging.getLogger(__name__)

COMPILE_SECONDS = 120.0  # allowed on top of the time-out for a loader's first batch
POLL_SECONDS = 0.2
HINT = "check the file with python -m data_prep verify; if it is sound, raise data.batch_timeout_seconds or look at the storage"


class Epoch(EpochIterator):  # type: ignore[misc]
    """One pass of ffcv's worker thread over ``order``, which says why when no batch comes, and ends when it is closed.

    Built directly, not by iterating the loader: so order and batch size may differ from pass to pass.
    """

    storage_state: Any
    output_queue: queue.Queue[Any]
    closed: bool

    def __init__(self, loader: Loader, order: NDArray[np.int64], *, batch: int, key: int, timeout_seconds: float) -> None:
        self.key = np.uint64(key & (2**64 - 1))
        self.damaged = np.full(1, -1, np.int64)
        self.timeout_seconds = timeout_seconds
        self.is_late = False
        self.error: Exception | None = None
        loader.batch_size = batch
        super().__init__(loader, order)  # starts the thread

    def run(self) -> None:
        """The worker thread."""
        # the decoders receive this tuple at every call: the way in for what changes from epoch to epoch
        self.storage_state = (self.storage_state, self.key, self.damaged)
        try:
            super().run()
        except Exception as error:
            self.error = error

    def receive(self, *, extra_seconds: float = 0.0) -> tuple[Tensor, Tensor]:
        """The next batch, in buffers that ffcv fills again after the call that follows; ``DataError``, saying why, if none comes."""
        deadline = time.monotonic() + self.timeout_seconds + extra_seconds
        while True:
            with suppress(queue.Empty):
                _, batch = self.output_queue.get(timeout=POLL_SECONDS)
                if self.damaged[0] >= 0:
                    raise DataError(f"the JPEG of sample {self.damaged[0]} cannot be decoded")
                return batch  # type: ignore[no-any-return]
            if not self.is_alive() and self.output_queue.empty():
                raise DataError(f"the worker thread died: {self.error!r}") from self.error
            if time.monotonic() > deadline:
                self.is_late = True
                raise DataError(f"no batch came within {self.timeout_seconds + extra_seconds:g} seconds")

    def close(self) -> None:
        """End the worker thread after the batch that it works on; one that is late already is not waited for."""
        if self.closed:
            return
        self.closed = True
        self.terminate_event.set()
        self.iter_ixes = iter(())  # ffcv looks at the event only while its queue is full
        full, self.output_queue = self.output_queue, queue.Queue()  # nor can its last put block now
        with suppress(queue.Empty):
            while True:
                full.get_nowait()
        self.join(timeout=0.0 if self.is_late else self.timeout_seconds)
        self.memory_context.__exit__(None, None, None)


class _Loader:
    """One ffcv loader and the way of its batches to the device."""

    def __init__(self, path: Path, decoder: KeyedDecoder, data: DataConfig, *, device: torch.device, channels_last: bool) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such file", do="write it with python -m data_prep, or correct data.train and data.val")
        num_workers = min(data.num_workers, numba_config.NUMBA_NUM_THREADS)
        if num_workers < data.num_workers:
            log.warning("data.num_workers is %d, this machine has %d cores: using %d", data.num_workers, num_workers, num_workers)
        pipelines = {"image": [decoder, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]}
        try:
            with keep_torch_threads():
                # the seed is never used, but without one ffcv draws from numpy's global generator
                self._ffcv = Loader(str(path), batch_size=1, num_workers=num_workers, os_cache=True, seed=0, pipelines=pipelines)
        except DataError as error:
            raise DataError(f"{path}: {error.what}", do=error.do) from error
        self.num_samples = int(self._ffcv.reader.num_samples)
        self.seconds_waited = 0.0
        self._path = path
        self._timeout_seconds = data.batch_timeout_seconds
        self._is_compiled = False
        self._rank, self._world_size = rank(), world_size()
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # laid out like one image: broadcasting over a short innermost dimension costs six times as much on a CPU
        image = (1, 3, decoder.resolution, decoder.resolution)
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1).expand(image) for values in (data.mean, data.std))
        self._mean = mean.contiguous(memory_format=self._memory_format)
        self._std = std.contiguous(memory_format=self._memory_format)

    def _batches(self, order: NDArray[np.int64], *, batch: int, key: int, name: str, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of ``order``, ``batch`` at a time (the last may be short), on the device. ``first`` numbers the first batch."""
        num_threads = torch.get_num_threads()
        epoch = Epoch(self._ffcv, order, batch=batch, key=key, timeout_seconds=self._timeout_seconds)
        try:
            for index in range(math.ceil(len(order) / batch)):
                started = time.perf_counter()
                try:
                    images, labels = epoch.receive(extra_seconds=0.0 if self._is_compiled else COMPILE_SECONDS)
                except DataError as error:
                    waited = f"after {time.perf_counter() - started:.1f} seconds"
                    raise DataError(f"{self._path}: {name}, batch {first + index}: {error.what}, {waited}", do=HINT) from error
                self.seconds_waited += time.perf_counter() - started
                if index == 0:
                    self._is_compiled = True
                    torch.set_num_threads(num_threads)  # the worker has set its own by now
                images, labels = images.to(self._device, non_blocking=True), labels.view(-1).to(self._device, non_blocking=True, copy=True)
                copied = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
                images = images.to(torch.float32, memory_format=self._memory_format)
                yield images.sub_(self._mean).div_(self._std), labels
                if copied is not None:
                    copied.synchronize()  # the next receive lets ffcv write into the buffers that this batch was copied from
        finally:
            epoch.close()


class TrainLoader(_Loader):
    """Training batches by global step, and micro-batches for the recalibration of BatchNorm.

    ``num_samples`` in the file, ``steps_per_epoch`` full global batches (the rest of an epoch's order is dropped), ``seconds_waited`` for
    data so far (set it to zero at will).
    """

    def __init__(self, path: Path, decoder: KeyedDecoder, data: DataConfig, *, global_batch: int, seed: int, **placing: Any) -> None:
        super().__init__(path, decoder, data, **placing)
        self.steps_per_epoch = self.num_samples // global_batch
        self._global_batch, self._seed = global_batch, seed
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{path} has {self.num_samples} samples, fewer than one global batch of {global_batch}", do="lower train.global_batch"
            )
        if global_batch % self._world_size:
            raise ConfigError(
                f"train.global_batch {global_batch} cannot be shared equally by {self._world_size} ranks",
                do="choose a multiple of the ranks",
            )

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Steps start … stop - 1 of the run: ``(step, (images, labels))``.

        This rank's part of the step's global batch: images float32 ``[batch, 3, resolution, resolution]``, normalised; labels int64
        ``[batch]``. The epoch is ``step // steps_per_epoch``; nothing before ``start`` is decoded.
        """
        step = start
        while step < stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            share = train_share(
                epoch_order(self._seed, epoch, self.num_samples),
                global_batch=self._global_batch,
                rank=self._rank,
                world_size=self._world_size,
            )[first : first + stop - step]
            key = stream_key("augmentation", self._seed, epoch)
            batches = self._batches(share.reshape(-1), batch=share.shape[1], key=key, name=f"epoch {epoch}", first=first)
            with closing(batches):  # type: ignore[type-var]
                for batch in batches:
                    yield step, batch
                    step += 1

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterator[Tensor]:
        """Augmented training images for recalibration, ``[batch, 3, resolution, resolution]`` each, the same set on any number of ranks.

        Micro-batch i is samples ``[i * batch, (i + 1) * batch)`` of one order keyed by ``seed``; this rank yields those with
        i mod world_size = rank. There are at most num_samples // batch of them.
        """
        share = recalibration_share(
            seed, self.num_samples, batch=batch, num_batches=num_batches, rank=self._rank, world_size=self._world_size
        )
        batches = self._batches(share.reshape(-1), batch=batch, key=stream_key("recalibration", seed), name="recalibration")
        with closing(batches):  # type: ignore[type-var]
            for images, _ in batches:
                yield images


class EvalLoader(_Loader):
    """A set, every sample exactly once over all ranks: ``num_images`` of the file, evenly spread and numbered from 0, or all of them.

    ``num_samples`` counts them, ``seconds_waited`` as in training.
    """

    def __init__(
        self, path: Path, decoder: KeyedDecoder, data: DataConfig, *, batch: int, num_images: int | None = None, **placing: Any
    ) -> None:
        super().__init__(path, decoder, data, **placing)
        self._batch = batch
        self._samples = evenly_spread(self.num_samples, num_images)
        self.num_samples = len(self._samples)

    def turn_to(self, path: Path) -> None:
        """Read all of another file from now on. What was compiled for the first is kept: it is given file and tables with every batch."""
        self._ffcv.reader = Reader(str(path))
        self._ffcv.memory_manager = OSCacheManager(self._ffcv.reader)
        self._path, self.num_samples = path, int(self._ffcv.reader.num_samples)
        self._samples = evenly_spread(self.num_samples, None)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share: ``(sample ids, images, labels)`` on the device.

        Ids and labels int64 ``[n]``, images float32 ``[n, 3, resolution, resolution]``, normalised. n is the batch size but for the last
        batch, which may be smaller; a rank may have no batch at all.
        """
        share = eval_share(self.num_samples, rank=self._rank, world_size=self._world_size)
        ids = torch.from_numpy(share).to(self._device)
        batches = self._batches(self._samples[share], batch=self._batch, key=0, name="evaluation")
        with closing(batches):  # type: ignore[type-var]
            for index, (images, labels) in enumerate(batches):
                yield ids[index * self._batch : (index + 1) * self._batch], images, labels


def open_train_loader(data: DataConfig, *, global_batch: int, seed: int, device: torch.device, channels_last: bool) -> TrainLoader:
    """The loader of ``data.train`` for this rank, with the configured augmentation. ``global_batch`` counts the samples of all ranks."""
    place = {
        "random_resized_crop": lambda: augment.random_resized_crop(data.min_scale),
        "pad_crop_flip": lambda: augment.pad_crop(data.mean),
        "none": lambda: augment.centre_crop(1.0),
    }[data.augmentation]()
    decoder = KeyedDecoder(data.train_resolution, place, flip=data.flip, needs_resolution=data.augmentation == "pad_crop_flip")
    return TrainLoader(Path(data.train), decoder, data, global_batch=global_batch, seed=seed, device=device, channels_last=channels_last)


def open_eval_loader(
    path: Path, data: DataConfig, *, batch: int, device: torch.device, channels_last: bool, num_images: int | None = None
) -> EvalLoader:
    """The loader of any set for evaluation: centre crop of ``data.eval_ratio`` times the shorter side, at ``data.eval_resolution``."""
    decoder = KeyedDecoder(data.eval_resolution, augment.centre_crop(data.eval_ratio), flip=False)
    return EvalLoader(path, decoder, data, batch=batch, num_images=num_images, device=device, channels_last=channels_last)

"""Batches from a .beton file, read with ffcv; a problem is reported instead of waiting forever.

* A loader compiles its decoder in the first batch, once per process, which takes seconds. The
  resolution may change from epoch to epoch.
* ffcv waits forever if its worker thread dies. Here a :class:`DataError` is raised if a batch does
  not arrive in time, the worker dies, or an image cannot be decoded.
* ``num_workers`` threads decode. Importing ffcv sets torch to one thread, and every loader and epoch
  of ffcv sets it to ``num_workers``. Here torch's number of threads is always restored, because the
  session sets it.
* Files are read through the page cache, which all ranks of a node share. ffcv's other reader keeps
  every page in the private memory of each rank, from its first use to its last: in a random order,
  the whole file.
* An evaluation reads one file while the loader of the training set decodes ahead in another thread.
  One batch is decoded at a time: numba ends the process if two threads run parallel code at once
  and neither TBB nor OpenMP is installed.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment import Augmentation
from pipeline.data.code_cache import kept_on_disk
from pipeline.data.compiled import NUMBA_FLAGS
from pipeline.data.decoder import KeyedDecoder
from pipeline.data.ffcv_import import importing_ffcv, keep_torch_threads
from pipeline.data.order import arrivals
from pipeline.errors import DataError

with importing_ffcv():
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor, ToTorchImage

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 120.0  # added to the time-out of a loader's first batch
POLL_SECONDS = 0.2
BATCHES_AHEAD = 3  # number of batches that ffcv decodes in advance
# Bytes per read-ahead request: by default the read-ahead of a disk. Linux ignores the rest of a longer
# request.
READ_BYTES = 128 << 10
DECODING = threading.Lock()  # held while a batch is decoded
READ_AHEAD = 16  # with shuffled blocks, a block is requested this many batches before its first sample


class FileLoader(Loader):  # type: ignore[misc]
    """ffcv's loader, with `_compile_reader` in place of ffcv's own function.

    ffcv's own function marks numba's type of one-dimensional byte arrays as read-only, in place.
    Functions compiled earlier are then not found and are compiled again, each inside the other; with
    a second loader that can take an hour. The replacement is made in a property, because ffcv makes
    the memory manager within ``__init__`` and compiles with it there.
    """

    @property
    def memory_manager(self) -> OSCacheManager:
        """The memory manager of the file."""
        return self._memory_manager

    @memory_manager.setter
    def memory_manager(self, manager: OSCacheManager) -> None:
        manager.compile_reader = _compile_reader  # of this manager only: ffcv's class stays as it is
        self._memory_manager = manager


@functools.cache
def _compile_reader() -> Any:
    """Compile a function (address, (file, addresses, sizes)) -> bytes of the file, as ffcv does."""
    content, table = types.Array(types.uint8, 1, "C", readonly=True), types.uint64[::1]
    signature = content(types.uint64, types.Tuple([content, table, table]))
    reader = kept_on_disk(njit(**NUMBA_FLAGS)(_read))
    reader.compile(signature)
    reader.disable_compile()
    return reader


def _read(address, mem_state):  # type: ignore[no-untyped-def]
    size = mem_state[2][np.searchsorted(mem_state[1], address)]
    return mem_state[0][address : address + size]


class Epoch(EpochIterator):  # type: ignore[misc]
    """One pass of ffcv's worker thread over ``order``, which reports why a batch is missing and can be closed.

    It is built directly and not by iterating the loader, so that each pass can have its own order
    and batch size.
    """

    storage_state: Any
    output_queue: queue.Queue[Any]
    closed: bool

    def __init__(
        self, loader: FileLoader, order: NDArray[np.int64], *, batch: int, key: int, timeout_seconds: float
    ) -> None:
        self.key = np.uint64(key & (2**64 - 1))
        self.damaged = np.full(1, -1, np.int64)
        self.timeout_seconds = timeout_seconds
        self.is_late = False
        self.error: Exception | None = None
        loader.batch_size = batch
        super().__init__(loader, order)  # starts the thread

    def run(self) -> None:
        """The worker thread."""
        # decoders receive this tuple in every call, so it can carry what changes from epoch to epoch
        self.storage_state = (self.storage_state, self.key, self.damaged)
        try:
            super().run()
        except Exception as error:
            self.error = error

    def run_pipeline(self, *batch: Any) -> Any:
        """Decode one batch."""
        with DECODING:
            return super().run_pipeline(*batch)

    def receive(self, *, extra_seconds: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the next batch, in buffers that are valid until the next call.

        Raises:
            DataError: the batch does not arrive in time or is damaged, or the worker thread died.
        """
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
        """End the worker thread after its current batch; if that is late already, do not wait for it."""
        if self.closed:
            return
        self.closed = True
        self.terminate_event.set()
        self.iter_ixes = iter(())  # ffcv checks the event only while its queue is full
        full, self.output_queue = self.output_queue, queue.Queue()  # so that its last put cannot block
        with suppress(queue.Empty):
            while True:
                full.get_nowait()
        self.join(timeout=0.0 if self.is_late else self.timeout_seconds)
        self.memory_context.__exit__(None, None, None)


class FfcvSource:
    """The images of one .beton file, cropped and resized; see :class:`pipeline.data.loaders.ImageSource`."""

    def __init__(
        self, path: Path, augmentation: Augmentation, *, resolution: int, num_workers: int, timeout_seconds: float
    ) -> None:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file", do="write it with python -m data_prep, or correct data.train and data.val"
            )
        allowed = min(num_workers, numba_config.NUMBA_NUM_THREADS)
        if allowed < num_workers:
            logger.warning(
                "data.num_workers is %d, but this machine has %d cores: using %d", num_workers, allowed, allowed
            )
        self._decoder = KeyedDecoder(resolution, augmentation)
        pipelines = {"image": [self._decoder, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]}
        try:
            with keep_torch_threads():
                # the seed is never used, but without one ffcv draws from numpy's global generator
                self._ffcv = FileLoader(
                    str(path),
                    batch_size=1,
                    num_workers=allowed,
                    os_cache=True,
                    seed=0,
                    pipelines=pipelines,
                    batches_ahead=BATCHES_AHEAD,
                )
        except DataError as error:
            raise DataError(f"{path}: {error.what}", do=error.do) from error
        self.path = path
        self.num_samples = int(self._ffcv.reader.num_samples)
        self.timeout_seconds = timeout_seconds
        self._is_compiled = False

    @property
    def page_size(self) -> int:
        """Size of the file's pages in bytes; no image crosses a page boundary."""
        return int(self._ffcv.reader.page_size)

    def blocks(self) -> NDArray[np.int64]:
        """Return the page of every sample, [num_samples]."""
        return np.asarray(self._ffcv.reader.metadata["f0"]["data_ptr"] // np.uint64(self.page_size), np.int64)

    def switch_to(self, path: Path) -> None:
        """Read another file from now on.

        The compiled functions are kept, because they are given the file and its tables with every batch.
        """
        self._ffcv.reader = Reader(str(path))
        self._ffcv.memory_manager = OSCacheManager(self._ffcv.reader)
        self.path, self.num_samples = path, int(self._ffcv.reader.num_samples)

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images [n, 3, resolution, resolution] and labels [n, 1] of ``order``; see ``ImageSource``."""
        num_threads = torch.get_num_threads()
        self._decoder.resolution = resolution
        asks = _Reader(self.path, self.page_size, arrivals(self.blocks()[order], batch=batch)) if reads_ahead else None
        if not self._is_compiled:
            _say_that_it_compiles()
        epoch = Epoch(self._ffcv, order, batch=batch, key=key, timeout_seconds=self.timeout_seconds)
        try:
            for index in range(-(-len(order) // batch)):
                if asks is not None:
                    asks.until(index + BATCHES_AHEAD + READ_AHEAD)
                received = epoch.receive(extra_seconds=0.0 if self._is_compiled else COMPILE_SECONDS)
                if index == 0:
                    self._is_compiled = True
                    torch.set_num_threads(num_threads)  # the worker has set its own by now
                yield received
        finally:
            epoch.close()
            if asks is not None:
                asks.close()


@functools.cache  # once in a process: its later files take seconds
def _say_that_it_compiles() -> None:
    logger.info("compiling the decoder of .beton files")


class _Reader:
    """Asks the kernel to read whole pages of a file before their samples are needed.

    One long read is faster than many short ones.
    """

    def __init__(self, path: Path, page_size: int, arrivals: list[tuple[int, int]]) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._page_size, self._arrivals, self._next = page_size, arrivals, 0

    def until(self, batch: int) -> None:
        """Request all pages that are needed before ``batch``."""
        while self._next < len(self._arrivals) and self._arrivals[self._next][0] < batch:
            start = self._arrivals[self._next][1] * self._page_size
            for offset in range(start, start + self._page_size, READ_BYTES):
                os.posix_fadvise(self._file, offset, READ_BYTES, os.POSIX_FADV_WILLNEED)
            self._next += 1

    def close(self) -> None:
        os.close(self._file)

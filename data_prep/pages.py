"""Write the pages of a .beton file from several processes at once.

As in ffcv, an image never crosses the end of a page.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.workers import shared_array
from pipeline.errors import DataError
from pipeline.files import cannot_write, write_everything

Reserve = Callable[[int], tuple[int, np.ndarray]]  # number of bytes -> (offset in the file, buffer for them)


class SharedCounter:
    """A counter 0, 1, 2, … that hands out each number once, shared with processes forked after its creation."""

    def __init__(self) -> None:
        self._value = shared_array((1,), np.dtype(np.int64))
        try:
            self._lock = multiprocessing.get_context("fork").Lock()
        except OSError as error:  # the lock is a file of 32 bytes there
            raise cannot_write(Path("/dev/shm"), error) from error

    @property
    def value(self) -> int:
        """The next number."""
        return int(self._value[0])

    def take(self) -> int:
        """Return the next number and advance."""
        with self._lock:
            self._value[0] += 1
            return int(self._value[0]) - 1


class PageWriter:
    """The page of one process: fill it with images, and write it to the next free page of the file when it is full."""

    def __init__(self, path: Path, next_page: SharedCounter, *, start: int, page_size: int) -> None:
        self.allocations: list[tuple[int, int, int]] = []  # sample, offset in the file, size
        self._path, self._next_page, self._start = path, next_page, start
        self._page = np.zeros(page_size, dtype=np.uint8)
        self._number = -1
        self._used = page_size  # no page yet

    def __enter__(self) -> PageWriter:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def reserve(self, sample: int) -> Reserve:
        """Return the function that ffcv's field calls to get a buffer for the bytes of ``sample``."""

        def reserve(num_bytes: int) -> tuple[int, np.ndarray]:
            if num_bytes > len(self._page):
                raise DataError(
                    f"sample {sample} takes {num_bytes} bytes, but a page holds {len(self._page)}",
                    do="set --max-resolution",
                )
            if self._used + num_bytes > len(self._page):
                self.flush()
                self._page.fill(0)
                self._number, self._used = self._next_page.take(), 0
            offset = self._start + self._number * len(self._page) + self._used
            room = self._page[self._used : self._used + num_bytes]
            self._used += num_bytes
            self.allocations.append((sample, offset, num_bytes))
            return offset, room

        return reserve

    def flush(self) -> None:
        """Write the page, if there is one.

        Raises:
            WriteError: it cannot be written.
        """
        if self._number >= 0:
            try:
                write_everything(self._file, self._page.data, self._start + self._number * len(self._page))
            except OSError as error:
                raise cannot_write(self._path, error, num_bytes=len(self._page)) from None

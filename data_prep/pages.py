"""The pages of a .beton file, written by several processes at once.

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

Reserve = Callable[[int], tuple[int, np.ndarray]]  # number of bytes -> (offset in the file, room for them)


class SharedCounter:
    """0, 1, 2, … , each number given out once to the processes forked after it was made."""

    def __init__(self) -> None:
        self._value = shared_array((1,), np.dtype(np.int64))
        try:
            self._lock = multiprocessing.get_context("fork").Lock()
        except OSError as error:  # it is a file there, of 32 bytes
            raise cannot_write(Path("/dev/shm"), error) from error

    @property
    def value(self) -> int:
        return int(self._value[0])

    def take(self) -> int:
        with self._lock:
            self._value[0] += 1
            return int(self._value[0]) - 1


class PageWriter:
    """One process's page: images are put into it until it is full; then it is written where the next free page of the file is."""

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
        """What ffcv's field calls to get room for the bytes of ``sample``."""

        def reserve(num_bytes: int) -> tuple[int, np.ndarray]:
            if num_bytes > len(self._page):
                raise DataError(
                    f"sample {sample} takes {num_bytes} bytes, a page has {len(self._page)}", do="set --max-resolution"
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
        """Write the page, if there is one. Raises WriteError."""
        if self._number >= 0:
            try:
                write_everything(self._file, self._page.data, self._start + self._number * len(self._page))
            except OSError as error:
                raise cannot_write(self._path, error, num_bytes=len(self._page)) from None

"""Writes one .beton file with ffcv, so that it appears under its final name only when it is complete and verified.

Imports ffcv (5 s): import this module late.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.writer import DatasetWriter, handle_sample

from data_prep.images import ImageOptions
from data_prep.progress import show_progress
from data_prep.workers import Send, run_workers
from pipeline.data.beton import BetonInfo, build_sidecar, save_sidecar, sidecar_path, verify
from pipeline.data.beton_format import SAMPLE
from pipeline.errors import PermissionDenied, WriteError

PAGE_SIZE_BYTES = 8 << 20
SHARED_MEMORY = Path("/dev/shm")


class Dataset(Protocol):
    """Images uint8 [height, width, 3] with their labels."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...


def write_beton(
    path: Path,
    dataset: Dataset,
    *,
    classes: Sequence[str],
    options: ImageOptions,
    source: dict[str, Any],
    num_workers: int,
    chunk_size: int = 100,
    min_bytes: int = 0,
) -> BetonInfo:
    """Write ``dataset`` to ``path`` with its sidecar, replacing what was there, and return what was verified.

    ``source`` goes into the sidecar; ``min_bytes`` is what the images will take at least. Raises WriteError, PermissionDenied, DataError or
    PeerError, and then leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.partial")  # the same name each time: what a killed run left is replaced
    _prepare_folder(path.parent, min_bytes, table_bytes=len(dataset) * SAMPLE.itemsize)
    try:
        with show_progress(f"writing {path.name}", "images") as report:
            page_size = _write(partial, dataset, options, num_workers=num_workers, chunk_size=chunk_size, report=report)
        parameters = {"ffcv": version("ffcv"), "opencv": cv2.__version__, "page_size": page_size, **asdict(options)}
        with show_progress(f"checking {path.name}", "pages") as report:
            sidecar = build_sidecar(partial, classes=list(classes), writer=parameters, source=source, on_progress=report)
        save_sidecar(partial, sidecar)
        verify(partial, level=1)
        _publish(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror}", do="free some space, or choose another --output") from error
    finally:
        partial.unlink(missing_ok=True)
        sidecar_path(partial).unlink(missing_ok=True)
    return verify(path, level=0)


def _prepare_folder(folder: Path, min_bytes: int, *, table_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except PermissionError:
        where = f"{folder}: may not be written by user id {os.geteuid()}"
        raise PermissionDenied(where, do="choose another --output, or make it writable") from None
    except OSError as error:
        raise WriteError(f"{folder}: {error.strerror}", do="choose another --output") from error
    for place, needed in ((folder, min_bytes), (SHARED_MEMORY, table_bytes)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise WriteError(f"{place}: needs at least {needed >> 20} MiB, {free >> 20} MiB are free", do="make room, or enlarge it")


def _write(
    path: Path, dataset: Dataset, options: ImageOptions, *, num_workers: int, chunk_size: int, report: Callable[[int, int], None]
) -> int:
    """Fill the file at ``path`` and return its page size. DatasetWriter's own loop over workers waits for ever when one of them dies."""
    num_samples = len(dataset)
    num_workers = max(1, min(num_workers, -(-num_samples // chunk_size)))
    fields = {"image": RGBImageField(**asdict(options)), "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=_page_size(options.max_resolution), num_workers=num_workers)
    writer.num_samples = num_samples
    writer.prepare()  # header, field descriptors, and the sample table in shared memory
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    allocations: list[tuple[int, int, int]] = []
    done = 0

    def work(worker: int, send: Send) -> None:
        cv2.setNumThreads(1)
        table = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type)
        allocator.__enter__()  # no `with`: after an error its exit would wait for the other workers' pages
        for start in range(worker * chunk_size, num_samples, num_workers * chunk_size):
            stop = min(start + chunk_size, num_samples)
            for index in range(start, stop):
                np.random.seed(index)  # noqa: NPY002  write_mode "proportion" draws from it: the same choice on every machine
                handle_sample(dataset[index], index, table.dtype.names, table, allocator, fields)
            send(stop - start)
        allocator.__exit__(None, None, None)  # writes the last page
        send(allocator.allocations)

    def receive(message: int | list[tuple[int, int, int]]) -> None:
        nonlocal done
        if isinstance(message, list):
            allocations.extend(message)
        else:
            done += message
            report(done, num_samples)

    try:
        run_workers(work, num_workers, receive=receive)
        writer.finalize(allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    return int(writer.page_size)


def _page_size(max_resolution: int | None) -> int:
    """A power of two that holds any one image."""
    largest_image = 3 * (max_resolution or 0) ** 2
    return max(PAGE_SIZE_BYTES, 1 << (largest_image - 1).bit_length() if largest_image else 0)


def _publish(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    sidecar_path(partial).replace(sidecar_path(path))  # first: a file without sidecar is refused, a sidecar without file is nothing
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""Write .beton files; they get their final names only when all of them are complete and verified.

ffcv's field resizes and compresses each image (``jpeg_field`` adds restart markers); the file around
the images is written here. ffcv's own DatasetWriter waits forever when a worker dies, takes a short
write for a complete one, and leaves named shared memory behind. This module imports ffcv, which
takes 5 s: import it late.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from data_prep.bad_images import report_bad
from data_prep.images import ImageOptions
from data_prep.jpeg_field import PartialField
from data_prep.pages import PageWriter, SharedCounter
from data_prep.stream import checked
from data_prep.workers import Send, run_workers, shared_array
from pipeline.datasets.beton_format import ALLOCATION, SAMPLE, describe_fields, finished_header, pages_start
from pipeline.datasets.image_file import BadImage
from pipeline.datasets.sidecar import BetonInfo, build_sidecar, save_sidecar, sidecar_path, verify
from pipeline.errors import DataError, PermissionDenied, WriteError
from pipeline.files import cannot_write, sync_folder, write_everything
from pipeline.terminal.progress import show_progress

PAGE_SIZE_BYTES = 8 << 20
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Dataset(Protocol):
    """Images uint8 [height, width, 3] with labels; an unusable one raises BadImage with its name and the reason."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class _Chosen:
    """Some images of a data set."""

    dataset: Dataset
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.dataset[int(self.indices[index])]


@dataclass(frozen=True)
class Split:
    """One file to write."""

    path: Path
    dataset: Dataset
    origin: Callable[[int], dict[str, Any]]  # number of images written -> the sidecar's ``source``
    min_bytes: int = 0  # smallest size that the images can take

    @property
    def partial(self) -> Path:
        """The name until the file is complete; always the same, so that a killed run's file is replaced."""
        return self.path.with_name(f".{self.path.name}.partial")


def write_beton(
    path: Path,
    dataset: Dataset,
    *,
    classes: Sequence[str],
    options: ImageOptions | None = None,
    source: dict[str, Any] | None = None,
    num_workers: int = 1,
    chunk_size: int = 100,
    min_bytes: int = 0,
) -> BetonInfo:
    """Write one file from a data set of one's own (docs/own-data.md), as ``write_splits`` does.

    Args:
        path: the file, ``….beton``.
        dataset: has a length, and items (image uint8 [height, width, 3], label).
        classes: names of the classes, in the order of their labels.
        options: how images are stored; None: as raw pixels.
        source: where the images are from, for the sidecar.
        num_workers: number of processes, each of which reads a part of the images.
        chunk_size: number of images that a worker takes at a time.
        min_bytes: smallest size that the images can take.

    Raises:
        DataError: an image is not as expected, or a label is not that of a class.
        WriteError, PermissionDenied, PeerError: as for ``write_splits``.
    """
    own = {"kind": "own", "num_images": len(dataset)} if source is None else source
    split = Split(Path(path), dataset, lambda _: own, min_bytes)
    options = options or ImageOptions()
    return write_splits([split], classes=classes, options=options, num_workers=num_workers, chunk_size=chunk_size)[0]


def write_splits(
    splits: Sequence[Split],
    *,
    classes: Sequence[str],
    options: ImageOptions,
    num_workers: int,
    chunk_size: int = 100,
    seed: int = 0,
    bad: Sequence[str] = (),
    skip_bad: int = 0,
) -> list[BetonInfo]:
    """Write all files with their sidecars, replacing existing ones, and verify them.

    An error leaves existing files as they were and no partial files behind.

    Args:
        splits: the files to write.
        classes: names of the classes, in the order of their labels.
        options: how images are stored.
        num_workers: number of processes.
        chunk_size: number of images that a worker takes at a time.
        seed: chooses the images that write mode "proportion" compresses.
        bad: images that were left out before, as lines ``file: why``.
        skip_bad: how many images may be left out in all.

    Raises:
        WriteError: a file cannot be written.
        PermissionDenied: a folder may not be written.
        DataError: too many images are unusable.
        PeerError: a worker process died.
    """
    for split in splits:
        _prepare_folder(
            split.path.parent, sum(other.min_bytes for other in splits if other.path.parent == split.path.parent)
        )
    all_bad = list(bad)
    with ExitStack() as stack:
        counts = []
        for split in splits:
            stack.callback(_remove, split.partial)
            with show_progress(f"writing {split.path.name}", "images") as report:
                split_bad = write_pages(
                    split, options, seed=seed, num_workers=num_workers, chunk_size=chunk_size, report=report
                )
            counts.append(len(split.dataset) - len(split_bad))
            all_bad += split_bad
        report_bad(all_bad, skip_bad)
        parameters = {"ffcv": version("ffcv"), "opencv": cv2.__version__, "seed": seed, **asdict(options)}
        for split, count in zip(splits, counts, strict=True):
            with show_progress(f"checking {split.path.name}", "pages") as report:
                sidecar = build_sidecar(
                    split.partial,
                    classes=list(classes),
                    writer=parameters,
                    source=split.origin(count),
                    on_progress=report,
                )
            save_sidecar(split.partial, sidecar)
            verify(split.partial, level=1)
        _publish(splits)
    return [verify(split.path, level=0) for split in splits]


def _prepare_folder(folder: Path, min_bytes: int) -> None:
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
    free = shutil.disk_usage(folder).free
    if free < min_bytes:
        raise WriteError(
            f"{folder}: needs at least {min_bytes >> 20} MiB, but {free >> 20} MiB are free",
            do="free some disk space, or choose another --output",
        )


def write_pages(
    split: Split,
    options: ImageOptions,
    *,
    seed: int,
    num_workers: int,
    chunk_size: int,
    report: Callable[[int, int], None],
) -> list[str]:
    """Write the partial file of ``split`` and return a line ``file: why`` for each image that was left out."""
    dataset, path, num_samples = split.dataset, split.partial, len(split.dataset)
    num_workers = max(1, min(num_workers, -(-num_samples // chunk_size)))
    field = PartialField(**asdict(options))
    page_size = _page_size(options.max_resolution)
    table, next_page = shared_array((num_samples,), SAMPLE), SharedCounter()
    path.unlink(missing_ok=True)
    _write_at(path, describe_fields(), 0)

    def work(worker: int, send: Send) -> None:
        row = np.zeros(1, dtype=field.metadata_type)
        with PageWriter(path, next_page, start=pages_start(num_samples, page_size), page_size=page_size) as pages:
            for start in range(worker * chunk_size, num_samples, num_workers * chunk_size):
                stop, bad = min(start + chunk_size, num_samples), {}
                for index in range(start, stop):
                    try:
                        image, label = dataset[index]
                    except BadImage as error:
                        bad[index] = str(error)
                        continue
                    # write mode "proportion" draws from this generator; the choice must not depend on num_workers
                    np.random.seed([seed, index])  # noqa: NPY002
                    image = checked(image, f"{split.path.name}: image {index}")
                    field.encode(row, image, pages.reserve(index))
                    table["image"][index], table["label"][index] = row[0], label
                send((stop - start, bad))
            pages.flush()
            send(np.array(pages.allocations, dtype=ALLOCATION))

    done, bad, allocations = 0, {}, [np.zeros(0, dtype=ALLOCATION)]

    def receive(message: tuple[int, dict[int, str]] | np.ndarray) -> None:
        nonlocal done
        if isinstance(message, np.ndarray):
            allocations.append(message)
        else:
            done += message[0]
            bad.update(message[1])
            report(done, num_samples)

    cv2.setNumThreads(1)  # OpenCV's thread pool does not survive the forks below
    run_workers(work, num_workers, receive=receive)
    if len(bad) == num_samples:
        raise DataError(f"{split.path}: none of the images is usable", do=f"check the first: {bad[0]}")
    is_good = np.ones(num_samples, dtype=bool)
    is_good[list(bad)] = False
    if pages_start(num_samples - len(bad), page_size) == pages_start(num_samples, page_size):
        _finish(
            path, table[is_good], np.concatenate(allocations), is_good, num_pages=next_page.value, page_size=page_size
        )
    else:  # without the bad images the table is a page shorter and all pages move: write once more without them
        good = replace(split, dataset=_Chosen(dataset, np.flatnonzero(is_good)))
        if lost := write_pages(good, options, seed=seed, num_workers=num_workers, chunk_size=chunk_size, report=report):
            raise DataError(
                f"{split.path}: images that could be read once cannot be read again: {lost[0]}",
                do="check the disk that holds them",
            )
    return [bad[index] for index in sorted(bad)]


def _finish(
    path: Path, table: np.ndarray, allocations: np.ndarray, is_good: np.ndarray, *, num_pages: int, page_size: int
) -> None:
    """Write header and tables, without the rows of the images that were left out."""
    allocations["sample"] = (np.cumsum(is_good) - 1)[allocations["sample"]]
    end = pages_start(len(table), page_size) + num_pages * page_size
    _write_at(path, allocations.tobytes(), end)
    _write_at(
        path, finished_header(page_size=page_size, num_samples=len(table), allocation_table=end) + table.tobytes(), 0
    )


def _write_at(path: Path, content: bytes, start: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            write_everything(descriptor, content, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_write(path, error, num_bytes=len(content)) from None


def _page_size(max_resolution: int | None) -> int:
    """Return a power of two that is large enough for any image."""
    largest_image = 3 * (max_resolution or 0) ** 2
    return max(PAGE_SIZE_BYTES, 1 << (largest_image - 1).bit_length() if largest_image else 0)


def _publish(splits: Sequence[Split]) -> None:
    """Give all files their final names.

    If this is killed halfway, a file has its own sidecar, or none and is rejected; never another's.
    """
    try:
        for split in splits:
            with split.partial.open("rb") as file:
                os.fsync(file.fileno())
        with _signals_held():
            for split in splits:
                sidecar_path(split.path).unlink(missing_ok=True)
            for split in splits:
                split.partial.replace(split.path)
            for split in splits:
                sidecar_path(split.partial).replace(sidecar_path(split.path))
            for folder in {split.path.parent for split in splits}:
                sync_folder(folder)
    except OSError as error:
        raise cannot_write(splits[0].path, error) from None


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delay signals that would end this process until the end of the block.

    A signal mask would not do: the signals would go to the threads of a library instead.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles no signals there
        yield
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in HELD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _remove(partial: Path) -> None:
    for path in partial.parent.glob(f"*{partial.name}*"):  # and its sidecar, complete or partial
        path.unlink(missing_ok=True)

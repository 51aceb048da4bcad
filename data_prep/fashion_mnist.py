"""Write Fashion-MNIST (70,000 grey images of 28×28 pixels, 10 classes; arXiv 1708.07747) from its four IDX files."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayImages, ArrayOptions, write_arrays
from data_prep.doctor import FASHION_MNIST
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": "train", "val": "t10k"}  # name of the file written: prefix of the IDX files
SIDE = 28
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801
MAX_SAMPLES = 10_000_000


def write_fashion_mnist(output: Path, *, source: Path = FASHION_MNIST, options: ArrayOptions) -> list[BetonInfo]:
    """Write ``train.beton`` and ``val.beton`` into ``output``.

    Both splits are read and checked before either is written.

    Args:
        output: folder to write the files to.
        source: folder of the four IDX files, gzipped or not.
        options: shared by every command that writes arrays.

    Raises:
        DataError: a file is missing or damaged.
    """
    datasets = {split: read_split(source, prefix) for split, prefix in SPLITS.items()}
    return write_arrays(output, datasets, classes=CLASSES, kind="fashion-mnist", options=options)


def read_split(folder: Path, prefix: str) -> ArrayImages:
    """Read the images and labels of one split.

    Raises:
        DataError: a file is missing or damaged.
    """
    images, images_sha256 = _read_idx(folder, f"{prefix}-images-idx3-ubyte", IMAGES_MAGIC, (SIDE, SIDE))
    labels, labels_sha256 = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", LABELS_MAGIC, ())
    if len(images) != len(labels):
        raise DataError(
            f"{folder}: {prefix} has {len(images)} images but {len(labels)} labels",
            do="pass a folder with the files of one data set",
        )
    wrong = np.flatnonzero(labels >= len(CLASSES))
    if wrong.size:
        raise DataError(
            f"{folder}: {prefix} sample {wrong[0]} has label {labels[wrong[0]]}, expected 0–9",
            do="download the file again",
        )
    return ArrayImages(images, labels, hashlib.sha256((images_sha256 + labels_sha256).encode()).hexdigest())


def _read_idx(folder: Path, name: str, magic: int, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Read one IDX file (big-endian int32: magic, count, shape; then bytes): its array and its sha256."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        do = "apt-get install dataset-fashion-mnist, or pass the folder of the four IDX files with --source"
        raise DataError(f"{folder}: has neither {name} nor {name}.gz", do=do)
    header_size = 4 * (2 + len(shape))
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else io.BufferedReader(raw) as file:
            header = file.read(header_size)
            numbers = np.frombuffer(header, dtype=">i4").tolist() if len(header) == header_size else []
            what, problem = "images" if shape else "labels", ""
            if numbers[:1] != [magic]:
                problem = f"is not an IDX file of {what}"
            elif tuple(numbers[2:]) != shape:
                problem = f"expected {SIDE}×{SIDE} images, got {'×'.join(map(str, numbers[2:]))}"
            elif not 0 < numbers[1] <= MAX_SAMPLES:
                problem = f"its header claims {numbers[1]} {what}, expected 1–{MAX_SAMPLES}"
            if problem:
                raise DataError(f"{path}: {problem}", do="download the file again")
            num_bytes = numbers[1] * int(np.prod(shape, dtype=int))
            content = file.read(num_bytes + 1)
    except EOFError:
        raise DataError(f"{path}: the gzip file is truncated", do="download the file again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", do="download the file again") from error
    if len(content) != num_bytes:
        found = "more" if len(content) > num_bytes else str(len(content))
        raise DataError(
            f"{path}: expected {num_bytes} bytes after its header, got {found}", do="download the file again"
        )
    array = np.frombuffer(content, dtype=np.uint8).reshape(numbers[1], *shape)
    return array, hashlib.sha256(header + content).hexdigest()

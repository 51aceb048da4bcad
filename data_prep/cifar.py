"""Write CIFAR-10 and CIFAR-100 (Krizhevsky 2009; 60,000 images of 32×32 pixels).

Reads the published binary or Python version, packed or unpacked. The binary version consists of
rows of label and pixels. The Python version consists of pickles, which are read by a restricted
unpickler (``cifar_pickle``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.archives import MAX_MEMBER_BYTES, has_member, read_member
from data_prep.arrays import ArrayImages, ArrayOptions, write_arrays
from data_prep.cifar_pickle import unpickle
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError

PIXELS = 3 * 32 * 32  # per image: all red values, all green, all blue
Read = Callable[[str], bytes]  # name of a file -> its content


@dataclass(frozen=True)
class Version:
    """One published form of a data set: its files, and where they hold the labels."""

    folder: str
    train: tuple[str, ...]
    val: str
    names: str  # file with the names of the classes
    position: int = 0  # of the label in a row of the binary version; the pixels follow it
    label_key: str = ""  # in the dictionaries of the Python version
    name_key: str = ""  # likewise, for the names of the classes


BINARY = {
    10: Version(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        0,
    ),
    # position 0 holds the 20 coarse labels
    100: Version("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 1),
}
PYTHON = {
    10: Version(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        0,
        "labels",
        "label_names",
    ),
    100: Version("cifar-100-python", ("train",), "test", "meta", 0, "fine_labels", "fine_label_names"),
}


def write_cifar(output: Path, *, source: Path, num_classes: int, options: ArrayOptions) -> list[BetonInfo]:
    """Write ``train.beton`` and ``val.beton`` into ``output``.

    Both splits are read and checked before either is written.

    Raises:
        DataError: ``source`` is missing or damaged.
    """
    datasets, classes = read_cifar(source, num_classes)
    return write_arrays(output, datasets, classes=classes, kind=f"cifar{num_classes}", options=options)


def read_cifar(source: Path, num_classes: int) -> tuple[dict[str, ArrayImages], list[str]]:
    """Read both splits and the names of the classes.

    Args:
        source: a published archive, or the folder it was unpacked into.
        num_classes: 10 or 100.

    Raises:
        DataError: ``source`` is missing or damaged.
    """
    version, read = _find(source, num_classes)
    is_binary = version is BINARY[num_classes]
    read_images = _read_binary if is_binary else _read_python
    datasets = {
        split: read_images(source, read, files, version)
        for split, files in (("train", version.train), ("val", (version.val,)))
    }
    classes = (
        read(version.names).decode(errors="replace").split()
        if is_binary
        else unpickle(read(version.names), source)[version.name_key]
    )
    if not isinstance(classes, list) or len(set(map(str, classes))) != num_classes:
        raise DataError(
            f"{source}: {version.names} does not name {num_classes} classes", do="download the archive again"
        )
    for split, images in datasets.items():
        if images.labels.min() < 0 or images.labels.max() >= num_classes:
            raise DataError(
                f"{source}: {split} has labels outside 0–{num_classes - 1}", do="download the archive again"
            )
    return datasets, [str(name) for name in classes]


def _find(source: Path, num_classes: int) -> tuple[Version, Read]:
    versions = (BINARY[num_classes], PYTHON[num_classes])
    for version in versions:
        if source.is_file() and has_member(source, f"{version.folder}/{version.names}"):
            return version, partial(_read_packed, source, version.folder)
        for folder in (source, source / version.folder):
            if (folder / version.names).is_file() and (folder / version.val).is_file():
                return version, partial(_read_file, folder)
    raise DataError(
        f"{source}: is neither {versions[0].folder} nor {versions[1].folder}, nor an archive of them",
        do=f"pass cifar-{num_classes}-binary.tar.gz or cifar-{num_classes}-python.tar.gz, or the unpacked folder",
    )


def _read_packed(archive: Path, folder: str, name: str) -> bytes:
    return read_member(archive, f"{folder}/{name}")


def _read_binary(source: Path, read: Read, files: tuple[str, ...], version: Version) -> ArrayImages:
    contents = [read(name) for name in files]
    row = version.position + 1 + PIXELS
    for name, content in zip(files, contents, strict=True):
        if not content or len(content) % row:
            raise DataError(
                f"{source}: {name} has {len(content)} bytes, expected a multiple of {row}",
                do="download the archive again",
            )
    rows = np.frombuffer(b"".join(contents), dtype=np.uint8).reshape(-1, row)
    return _images(rows[:, -PIXELS:], rows[:, version.position], contents)


def _read_python(source: Path, read: Read, files: tuple[str, ...], version: Version) -> ArrayImages:
    contents = [read(name) for name in files]
    pixels, labels = [], []
    for name, content in zip(files, contents, strict=True):
        batch = unpickle(content, source)
        data, batch_labels = batch.get("data"), batch.get(version.label_key)
        if (
            not isinstance(data, np.ndarray)
            or data.ndim != 2
            or data.shape[1] != PIXELS
            or not isinstance(batch_labels, list)
        ):
            raise DataError(
                f"{source}: {name} is not a batch of images of {PIXELS} values with a list {version.label_key!r}",
                do="download the archive again",
            )
        if not len(data) == len(batch_labels) > 0 or not all(type(label) is int for label in batch_labels):
            raise DataError(
                f"{source}: {name} has {len(data)} images and {len(batch_labels)} labels",
                do="download the archive again",
            )
        pixels.append(data)
        labels.append(np.array(batch_labels))
    return _images(np.concatenate(pixels), np.concatenate(labels), contents)


def _images(pixels: np.ndarray, labels: np.ndarray, contents: list[bytes]) -> ArrayImages:
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    sha256 = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    return ArrayImages(images, labels.astype(np.int64), sha256)


def _read_file(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{path}: has {path.stat().st_size >> 20} MiB, expected at most {MAX_MEMBER_BYTES >> 20}",
                do="download the archive again",
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", do="download the archive again") from None

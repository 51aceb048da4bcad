"""CIFAR from its binary and its Python version: the same images, labels and names.

Pickles that hold anything else are refused.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.arrays import ArrayOptions
from data_prep.cifar import BINARY, PYTHON, read_cifar, write_cifar
from data_prep.cifar_pickle import unpickle
from data_prep.hold_out import choose_held_out
from pipeline.datasets.beton_format import read_tables
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import ConfigError, DataError

PER_BATCH = 20
NAMES = {10: [f"kind{i}" for i in range(10)], 100: [f"fine{i}" for i in range(100)]}


def batch(index: int, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """Make pixels, uint8 [20, 3072] (red, green, blue planes), and labels."""
    random = np.random.default_rng(index)
    return random.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8), random.integers(
        0, num_classes, PER_BATCH
    ).tolist()


def python2(value: object) -> bytes:
    """Pickle ``value`` like Python 2 with numpy 1, protocol 2: text as bytes, arrays by three names."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin-1")
    assert isinstance(value, np.ndarray)
    shape = b"".join(map(python2, value.shape))
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return (
        made
        + b"(K\x01("
        + shape
        + b"t"
        + dtype
        + b"\x89"
        + b"T"
        + struct.pack("<i", value.nbytes)
        + value.tobytes()
        + b"tb"
    )


def dump(value: object) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def make_binary(root: Path, num_classes: int) -> Path:
    version = BINARY[num_classes]
    folder = root / version.folder
    folder.mkdir(parents=True)
    (folder / version.names).write_text("\n".join(NAMES[num_classes]) + "\n\n")
    for index, name in enumerate((*version.train, version.val)):
        pixels, labels = batch(index, num_classes)
        rows = [
            bytes([label // 5, label] if num_classes == 100 else [label]) + row.tobytes()
            for label, row in zip(labels, pixels, strict=True)
        ]
        (folder / name).write_bytes(b"".join(rows))
    return folder


def make_python(root: Path, num_classes: int) -> Path:
    version = PYTHON[num_classes]
    folder = root / version.folder
    folder.mkdir(parents=True)
    (folder / version.names).write_bytes(dump({"num_cases_per_batch": PER_BATCH, version.name_key: NAMES[num_classes]}))
    for index, name in enumerate((*version.train, version.val)):
        pixels, labels = batch(index, num_classes)
        (folder / name).write_bytes(
            dump({"batch_label": name, version.label_key: labels, "data": pixels, "filenames": ["a.png"] * PER_BATCH})
        )
    return folder


def pack(folder: Path) -> Path:
    archive = folder.parent / f"{folder.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("num_classes", [10, 100])
def test_both_versions_packed_and_unpacked_hold_the_same(num_classes: int, tmp_path: Path) -> None:
    folders = make_binary(tmp_path, num_classes), make_python(tmp_path, num_classes)
    for folder in folders:
        for source in (folder, pack(folder)):
            datasets, names = read_cifar(source, num_classes)
            assert names == NAMES[num_classes]
            assert [len(datasets[split]) for split in ("train", "val")] == [
                100 if num_classes == 10 else PER_BATCH,
                PER_BATCH,
            ]
            pixels, labels = batch(0, num_classes)
            image, label = datasets["train"][7]
            assert (image.shape, label) == ((32, 32, 3), labels[7])
            assert image[1, 2].tolist() == [pixels[7, plane * 1024 + 1 * 32 + 2] for plane in range(3)]
            assert datasets["val"].labels.tolist() == batch(5 if num_classes == 10 else 1, num_classes)[1]


def test_written_with_a_subset(tmp_path: Path) -> None:
    make_binary(tmp_path, 10)
    options = ArrayOptions(num_workers=1, subset=30, seed=1)
    train, val = write_cifar(tmp_path / "out", source=tmp_path, num_classes=10, options=options)
    assert (train.num_samples, val.num_samples, train.classes, train.image_mode) == (30, PER_BATCH, NAMES[10], "raw")
    assert np.bincount(read_tables(train.path).samples["label"]).tolist() == [3] * 10


def test_held_out_images_are_no_training_images(tmp_path: Path) -> None:
    make_binary(tmp_path, 10)
    whole = read_cifar(tmp_path, 10)[0]["train"]

    def write(folder: str, seed: int = 0) -> list[BetonInfo]:
        options = ArrayOptions(num_workers=1, seed=seed, hold_out=20)
        return write_cifar(tmp_path / folder, source=tmp_path, num_classes=10, options=options)

    train, val, held_out = write("out")
    assert [info.num_samples for info in (train, val, held_out)] == [80, PER_BATCH, 20]
    assert held_out.path == tmp_path / "out" / "held_out.beton"
    assert held_out.sidecar["source"]["num_images"] == 20
    assert np.bincount(read_tables(held_out.path).samples["label"]).tolist() == [2] * 10
    chosen = choose_held_out(whole.labels, 20, seed=0)
    parts = [{pixels.tobytes() for pixels in whole.images[which]} for which in (chosen, ~chosen)]
    assert (len(parts[0]), len(parts[1]), parts[0] & parts[1]) == (20, 80, set())
    assert [stored_images(info) for info in (held_out, train)] == parts
    assert [info.digest for info in write("again")] == [train.digest, val.digest, held_out.digest]
    assert write("other", seed=1)[2].digest != held_out.digest
    with pytest.raises(ConfigError, match=r"held_out.beton: contains images held out of the train.beton"):
        write_cifar(tmp_path / "out", source=tmp_path, num_classes=10, options=ArrayOptions(num_workers=1))


def stored_images(info: BetonInfo) -> set[bytes]:
    """Read the raw images of a file."""
    tables, content = read_tables(info.path), info.path.read_bytes()
    return {content[start : start + size] for start, size in zip(tables.pointer, tables.size, strict=True)}


class Runs:
    """An attacker's pickle: it calls a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("/tmp/should-never-be-there",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps({"data": Runs()}), r"names posix.mkdir"),
        (b"\x80\x02cbuiltins\neval\nU\x011\x85R.", "names builtins.eval"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", r"names numpy.core.multiarray.scalar"),
        (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "not callable"),
        (pickle.dumps({"data": np.zeros(3)}), "names numpy"),
        (
            dump({"data": np.zeros((2, 3072), np.uint8)}).replace(b"U\x02u1", b"U\x02O8"),
            "an array of anything but bytes",
        ),
        (
            dump({"data": np.zeros((2, 3072), np.uint8)}).replace(
                struct.pack("<i", 3072), struct.pack("<i", 1 << 30), 1
            ),
            "cannot reshape",
        ),
        (dump([1, 2]), "not a dictionary"),
        (dump({"data": np.zeros((2, 3072), np.uint8)})[:-500], "truncated"),
        (b"U\x01aP5\n.", ""),
        (b"", ""),
        (bytes(range(256)), ""),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(content: bytes, why: str) -> None:
    with pytest.raises(DataError, match=f"is not a file of CIFAR's Python version: .*{why}"):
        unpickle(content, Path("batch"))
    assert not Path("/tmp/should-never-be-there").exists()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is neither cifar-10-batches-bin nor cifar-10-batches-py"):
        read_cifar(tmp_path, 10)
    folder = make_binary(tmp_path, 100)
    with pytest.raises(DataError, match="is neither cifar-10-batches-bin"):
        read_cifar(folder, 10)
    content = (folder / "test.bin").read_bytes()
    (folder / "test.bin").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"test.bin has 61479 bytes, expected a multiple of 3074"):
        read_cifar(folder, 100)
    (folder / "test.bin").write_bytes(b"\0\xc8" + content[2:])  # label 200
    with pytest.raises(DataError, match=r"val has labels outside 0–99"):
        read_cifar(folder, 100)
    (folder / "fine_label_names.txt").write_text("only one")
    with pytest.raises(DataError, match=r"does not name 100 classes"):
        read_cifar(folder, 100)
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(DataError, match="nor an archive of them"):
        read_cifar(tmp_path / "other.tar.gz", 10)
    python = make_python(tmp_path, 10)
    pixels, labels = batch(0, 10)
    (python / "test_batch").write_bytes(dump({"data": pixels, "labels": labels[:-1]}))
    with pytest.raises(DataError, match="test_batch has 20 images and 19 labels"):
        read_cifar(python, 10)

"""Fashion-MNIST round trip: from IDX files to pixels and labels read by ffcv's own loader."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from data_prep.arrays import ArrayOptions
from data_prep.doctor import FASHION_MNIST
from data_prep.fashion_mnist import CLASSES, read_split, write_fashion_mnist
from pipeline.datasets.sidecar import compare_class_lists
from pipeline.errors import DataError
from tests.support.packages import needs_fashion_mnist

COUNTS = {"train": 250, "t10k": 60}
HEADER_SIZES = {"images-idx3": 16, "labels-idx1": 8}

pytestmark = needs_fashion_mnist


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the real files, training set plain, test set gzipped."""
    folder = tmp_path_factory.mktemp("idx")
    for prefix, count in COUNTS.items():
        for kind, header_size in HEADER_SIZES.items():
            name = f"{prefix}-{kind}-ubyte"
            content = gzip.decompress((FASHION_MNIST / f"{name}.gz").read_bytes())
            per_sample = 784 if header_size == 16 else 1
            small = content[:4] + count.to_bytes(4, "big") + content[8 : header_size + count * per_sample]
            if prefix == "train":
                (folder / name).write_bytes(small)
            else:
                (folder / f"{name}.gz").write_bytes(gzip.compress(small, 1))
    return folder


def test_pixels_and_labels_come_back_through_ffcv(idx_folder: Path, tmp_path: Path) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    train, val = write_fashion_mnist(tmp_path, source=idx_folder, options=ArrayOptions(num_workers=2))
    compare_class_lists(train, val)
    assert (train.num_samples, val.num_samples, train.classes) == (250, 60, list(CLASSES))
    assert (train.image_mode, train.max_height, train.max_width) == ("raw", 28, 28)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train.beton",
        "train.beton.json",
        "val.beton",
        "val.beton.json",
    ]

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(train.path), batch_size=50, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    images, labels = np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])[:, 0]
    with gzip.open(FASHION_MNIST / "train-images-idx3-ubyte.gz") as file:
        expected = np.frombuffer(file.read(16 + 250 * 784)[16:], dtype=np.uint8).reshape(250, 28, 28, 1)
    assert np.array_equal(images, np.broadcast_to(expected, (250, 28, 28, 3)))
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # the first labels of the published training set


def test_digest_does_not_depend_on_the_number_of_workers(idx_folder: Path, tmp_path: Path) -> None:
    one = write_fashion_mnist(tmp_path / "one", source=idx_folder, options=ArrayOptions(num_workers=1))
    three = write_fashion_mnist(tmp_path / "three", source=idx_folder, options=ArrayOptions(num_workers=3))
    assert [info.digest for info in one] == [info.digest for info in three]
    assert one[0].digest != one[1].digest


def test_missing_and_damaged_idx_files(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has neither train-images-idx3-ubyte nor .*apt-get install dataset-fashion-mnist"
    ):
        read_split(tmp_path, "train")
    images, labels = (idx_folder / f"train-{kind}-ubyte" for kind in HEADER_SIZES)
    (tmp_path / images.name).write_bytes(images.read_bytes())
    (tmp_path / labels.name).write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(DataError, match="expected 250 bytes after its header, got 249"):
        read_split(tmp_path, "train")
    (tmp_path / labels.name).write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(DataError, match="sample 249 has label 10, expected 0–9"):
        read_split(tmp_path, "train")
    (tmp_path / images.name).write_bytes(labels.read_bytes())
    with pytest.raises(DataError, match="is not an IDX file of images"):
        read_split(tmp_path, "train")
    (tmp_path / images.name).unlink()
    (tmp_path / f"{images.name}.gz").write_bytes(gzip.compress(images.read_bytes())[:-500])
    with pytest.raises(DataError, match="the gzip file is truncated"):
        read_split(tmp_path, "train")

"""Every snippet of docs/own-data.md writes the images of its source; what is no image is one line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.stream import Stream
from data_prep.writer import write_beton
from pipeline.datasets.beton_format import read_tables
from pipeline.datasets.sidecar import verify
from pipeline.errors import DataError
from tests.support.launch import ROOT

PAGE = (ROOT / "docs" / "own-data.md").read_text()
FOUND = re.findall(r"```python\n(.*?write_beton\(\"(\w+)\.beton\".*?)```", PAGE, re.DOTALL)
SNIPPETS = {name: code for code, name in FOUND}
NEEDS = {"rows": "datasets", "streamed": "webdataset"}  # by the name of the file
NUM_IMAGES = 6


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (12, 9 + index % 2, 3), dtype=np.uint8)


def jpeg(index: int) -> bytes:
    coded = io.BytesIO()
    Image.fromarray(pixels(index)).save(coded, "jpeg", quality=95)
    return coded.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same six images, by turns round and square, as folders and in two shards; as arrays five of their columns."""
    root = tmp_path_factory.mktemp("sources")
    (root / "shards").mkdir()
    for index in range(NUM_IMAGES):
        image = Image.fromarray(pixels(index))
        for split in ("train", "val"):
            path = root / "photos" / split / ("round", "square")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        with tarfile.open(root / "shards" / f"{index // 3}.tar", "a") as shard:
            for ending, content in (("jpg", jpeg(index)), ("cls", str(index % 2).encode())):
                member = tarfile.TarInfo(f"{index:04}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    np.save(root / "images.npy", np.stack([pixels(index)[:, :5] for index in range(NUM_IMAGES)]))
    np.save(root / "labels.npy", np.arange(NUM_IMAGES) % 2)
    return root


def test_the_page_has_a_snippet_for_every_source() -> None:
    assert list(SNIPPETS) == ["folder", "arrays", "rows", "shards", "streamed", "drawn"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippet_writes_the_images_of_its_source(
    name: str, sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed: pip install {NEEDS[name]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with contextlib.chdir(sources):
        exec(compile(SNIPPETS[name], f"{name} of docs/own-data.md", "exec"), {"__name__": "snippet"})
        info = verify(Path(f"{name}.beton"), level=2)
        stored = list(images_of(Path(f"{name}.beton")))
    if name == "drawn":
        assert (info.num_samples, info.classes) == (100, ["low", "high"])
        assert all((image[23] == 255).all() == bool(label) for image, label in stored)
        return
    assert (info.num_samples, info.classes) == (NUM_IMAGES, ["round", "square"])
    by_class = name in ("folder", "rows")
    order = sorted(range(NUM_IMAGES), key=lambda index: index % 2) if by_class else list(range(NUM_IMAGES))
    for index, (image, label) in zip(order, stored, strict=True):
        expected = pixels(index)[:, :5] if name == "arrays" else pixels(index)
        assert label == index % 2 and image.shape == expected.shape
        if name in ("shards", "streamed"):
            expected = np.asarray(Image.open(io.BytesIO(jpeg(index))))
        assert np.array_equal(image, expected)


def images_of(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    content = np.fromfile(path, np.uint8)
    for sample in read_tables(path).samples:
        start, shape = (
            int(sample["image"]["pointer"]),
            (int(sample["image"]["height"]), int(sample["image"]["width"]), 3),
        )
        yield content[start : start + int(np.prod(shape))].reshape(shape), int(sample["label"])


def test_the_command_of_the_page_writes_both_splits(sources: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"^python -m data_prep (image-folder .*) --output data$", PAGE, re.MULTILINE)
    with contextlib.chdir(sources):
        assert main([*command.split(), "--output", str(tmp_path), "--workers", "1"]) == 0
    assert verify(tmp_path / "train.beton").num_samples == verify(tmp_path / "val.beton").num_samples == NUM_IMAGES


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \[3, 4, 4\]"),
        (Image.new("L", (4, 4)), "Image"),
    ],
)
def test_what_is_no_image_is_one_line(image: object, found: str, tmp_path: Path) -> None:
    expected = rf"image 1: expected an array uint8 \[height, width, 3\], got {found}; do: pass np.asarray"
    images = [(np.zeros((4, 4, 3), np.uint8), 0), (image, 0)]
    with pytest.raises(DataError, match=expected):
        Stream(images)
    with pytest.raises(DataError, match=f"a.beton: {expected}"):
        write_beton(tmp_path / "a.beton", images, classes=["only"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="label"):
        write_beton(tmp_path / "a.beton", [(images[0][0], 3)], classes=["only"])
    assert not list(tmp_path.iterdir())

"""Image folders: conversion to RGB, files that are no usable image, class folders, and what is written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.image_folder import list_samples, write_image_folders
from data_prep.images import BadImage, ImageOptions, check_image, load_rgb
from pipeline.data.beton import BetonInfo, verify
from pipeline.data.beton_format import JPEG, RAW, read_tables
from pipeline.errors import DataError
from tests.support.imagenet_shaped import class_name, make_image_folder

RAW_AT_64 = ImageOptions(write_mode="raw", max_resolution=64)


def write(
    train: Path, val: Path, output: Path, *, options: ImageOptions = RAW_AT_64, skip_bad: int = 0, subset: int | None = None
) -> list[BetonInfo]:
    return write_image_folders(output, train=train, val=val, options=options, subset=subset, skip_bad=skip_bad, num_workers=2, chunk_size=4)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_image_folder(tmp_path / "images", num_classes=5, train_per_class=4, val_per_class=2)


def stored_image(info: BetonInfo, sample: int) -> np.ndarray:
    """A raw image as it lies in the file."""
    tables = read_tables(info.path)
    row = tables.samples["image"][sample]
    assert row["mode"] == RAW
    content = info.path.read_bytes()[tables.pointer[sample] :][: tables.size[sample]]
    return np.frombuffer(content, dtype=np.uint8).reshape(row["height"], row["width"], 3)


def test_what_is_written_is_what_was_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    infos = write(train, val, tmp_path / "out", options=ImageOptions(write_mode="raw", max_resolution=500))
    assert [info.num_samples for info in infos] == [20, 10]
    assert infos[0].classes == [class_name(label) for label in range(5)] == infos[1].classes
    assert read_tables(infos[0].path).samples["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    files = sorted(train.glob("*/*"))
    for sample in (0, 7, 19):
        assert np.array_equal(stored_image(infos[0], sample), np.asarray(Image.open(files[sample]).convert("RGB")))


def test_grey_cmyk_palette_and_misnamed_images_become_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (20, 10), (255, 0, 0))
    for name, image, kind, expected in (
        ("grey.JPEG", Image.new("L", (20, 10), 100), "JPEG", (100, 100, 100)),
        ("cmyk.JPEG", Image.new("CMYK", (20, 10), (0, 0, 0, 255)), "JPEG", (0, 0, 0)),
        ("palette.png", red.quantize(4), "PNG", (255, 0, 0)),
        ("alpha.png", Image.new("RGBA", (20, 10), (1, 2, 3, 0)), "PNG", (1, 2, 3)),
        ("a png in truth.JPEG", red, "PNG", (255, 0, 0)),  # ImageNet has one of these
    ):
        image.save(tmp_path / name, kind)
        assert load_rgb(tmp_path / name).shape == (10, 20, 3)
        assert load_rgb(tmp_path / name)[5, 5].tolist() == list(expected), name


def test_files_that_are_no_usable_image(tmp_path: Path) -> None:
    photograph = tmp_path / "whole.jpg"
    Image.effect_noise((200, 100), 50).convert("RGB").save(photograph)
    content = photograph.read_bytes()
    bad = {
        "empty.jpg": (b"", "empty"),
        "truncated.jpg": (content[: len(content) // 2], "cannot be decoded: .*truncated"),
        "text.jpg": (b"not an image at all", "not a JPEG or PNG"),
    }
    for name, (written, reason) in bad.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(BadImage, match=reason):
            check_image(tmp_path / name, 500)
    Image.new("RGB", (10, 10)).save(tmp_path / "a gif.jpg", "GIF")
    Image.fromarray(np.full((10, 10), 60000, np.uint16)).save(tmp_path / "16 bit.png")
    Image.new("L", (12_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("L", (2000, 1)).save(tmp_path / "line.png")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (
        ("a gif.jpg", "not a JPEG or PNG"),
        ("16 bit.png", "more than 8 bits"),
        ("huge.png", "12000×10000 pixels, more than"),
        ("line.png", "leave nothing of the short side"),
        ("folder.jpg", "not a regular file"),
    ):
        with pytest.raises(BadImage, match=reason):
            check_image(tmp_path / name, 500)


def test_bad_files_are_listed_and_counted_and_left_out_only_when_allowed(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = folders
    (train / class_name(1) / "empty.JPEG").touch()
    (train / class_name(2) / "notes.txt").write_text("not an image")
    (val / class_name(0) / "cut.JPEG").write_bytes(next((val / class_name(0)).iterdir()).read_bytes()[:3000])
    (train / class_name(3) / ".hidden").touch()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DataError, match=r"not usable images: 3, where 2 may be skipped.*--skip-bad 3"),
    ):
        write(train, val, tmp_path / "out", skip_bad=2)
    assert [name in caplog.text for name in ("empty.JPEG: empty", "notes.txt: not a JPEG", "cut.JPEG", ".hidden")] == [
        True,
        True,
        True,
        False,
    ]
    assert not (tmp_path / "out").exists()

    infos = write(train, val, tmp_path / "out", skip_bad=3)
    assert [info.num_samples for info in infos] == [20, 10]
    assert [info.sidecar["source"]["num_skipped"] for info in infos] == [2, 1]


def test_train_and_val_must_have_the_same_class_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    (val / class_name(4)).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"val: lacks classes that .*train has \(1\): {class_name(4)}"):
        write(train, val, tmp_path / "out")
    (val / class_name(4)).mkdir()
    with pytest.raises(DataError, match="holds no images"):
        write(train, val, tmp_path / "out")
    with pytest.raises(DataError, match="No such file"):
        write(train, tmp_path / "nowhere", tmp_path / "out")


def test_a_subset_is_spread_over_the_classes(folders: tuple[Path, Path]) -> None:
    train, _ = folders
    classes = [class_name(label) for label in range(5)]
    assert [sample.label for sample in list_samples(train, classes, 7)] == [0, 0, 1, 1, 2, 3, 4]
    assert len(list_samples(train, classes, 1000)) == 20


def test_write_modes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders

    def modes(options: ImageOptions) -> list[int]:
        info, _ = write(train, val, tmp_path, options=options)
        verify(info.path, level=2)
        return read_tables(info.path).samples["image"]["mode"].tolist()

    assert set(modes(ImageOptions("jpg", max_resolution=64))) == {JPEG}
    mixed = modes(ImageOptions("proportion", max_resolution=64))
    assert set(mixed) == {JPEG, RAW}
    assert modes(ImageOptions("proportion", max_resolution=64)) == mixed  # which image is compressed depends on its index alone
    assert modes(ImageOptions("smart", max_resolution=64, smart_threshold=10**6)) == [RAW] * 20


def test_digest_follows_the_content_of_the_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    before, _ = write(train, val, tmp_path / "before")
    shutil.copytree(train, tmp_path / "copy")
    copied, _ = write(tmp_path / "copy", val, tmp_path / "copied")
    first, second, *_ = sorted((train / class_name(0)).iterdir())
    first.write_bytes(second.read_bytes())
    after, _ = write(train, val, tmp_path / "after")
    assert copied.digest == before.digest != after.digest
    assert copied.sidecar["source"] == before.sidecar["source"] != after.sidecar["source"]

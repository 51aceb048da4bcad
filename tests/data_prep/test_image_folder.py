"""Image folders: conversion to RGB, unusable images, class folders, and what is written."""

from __future__ import annotations

import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.hold_out import choose_held_out
from data_prep.image_files import WriteOptions
from data_prep.image_folder import list_samples, write_image_folders
from data_prep.images import ImageOptions
from data_prep.split_folder import split_folder
from pipeline.datasets.beton_format import JPEG, RAW, read_tables
from pipeline.datasets.image_file import BadImage, ImageFile, load_rgb, read_facts
from pipeline.datasets.sidecar import BetonInfo, verify
from pipeline.errors import ConfigError, DataError
from tests.support.imagenet_shaped import class_name, make_image_folder

RAW_AT_64 = ImageOptions(write_mode="raw", max_resolution=64)


def write(
    train: Path,
    val: Path,
    output: Path,
    *,
    options: ImageOptions = RAW_AT_64,
    skip_bad: int = 0,
    is_upright: bool = False,
    seed: int = 0,
) -> list[BetonInfo]:
    how = WriteOptions(options, skip_bad=skip_bad, is_upright=is_upright, seed=seed, num_workers=2, chunk_size=4)
    return write_image_folders(output, train=train, val=val, options=how)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return make_image_folder(tmp_path / "images", num_classes=5, train_per_class=4, val_per_class=2)


def stored_image(info: BetonInfo, sample: int) -> np.ndarray:
    """Read a raw image from the file."""
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
        pixels, _ = load_rgb(ImageFile(tmp_path / name))
        assert pixels.shape == (10, 20, 3)
        assert pixels[5, 5].tolist() == list(expected), name


def test_files_that_are_no_usable_image(tmp_path: Path) -> None:
    """They are found by their headers if possible, otherwise when their pixels are decoded."""
    photograph = tmp_path / "whole.jpg"
    Image.effect_noise((200, 100), 50).convert("RGB").save(photograph)
    content = photograph.read_bytes()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not an image at all")
    Image.new("RGB", (10, 10)).save(tmp_path / "a gif.jpg", "GIF")
    Image.new("RGB", (10, 10)).save(
        tmp_path / "animated.png", save_all=True, append_images=[Image.new("RGB", (10, 10), 255)]
    )
    Image.fromarray(np.full((10, 10), 60000, np.uint16)).save(tmp_path / "16 bit.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "16 bit colour.png")
    png = bytearray((tmp_path / "16 bit colour.png").read_bytes())
    png[24], png[29:33] = (
        16,
        zlib.crc32(bytes(png[12:24]) + b"\x10" + bytes(png[25:29])).to_bytes(4, "big"),
    )  # bit depth, CRC of IHDR
    (tmp_path / "16 bit colour.png").write_bytes(png)
    Image.new("L", (12_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("L", (2000, 1)).save(tmp_path / "line.png")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (
        ("empty.jpg", "empty"),
        ("text.jpg", "not a JPEG or PNG"),
        ("a gif.jpg", "not a JPEG or PNG"),
        ("animated.png", "animated"),
        ("16 bit.png", "at most 8 bits per channel, got 16"),
        ("16 bit colour.png", "at most 8 bits per channel, got 16"),
        ("huge.png", "12000×10000 pixels, expected at most"),
        ("line.png", "its shorter side would shrink to 0 at"),
        ("folder.jpg", "a folder, expected an image"),
    ):
        with pytest.raises(BadImage, match=reason):
            read_facts(ImageFile(tmp_path / name), 500)
    assert read_facts(ImageFile(tmp_path / "truncated.jpg"), 500).width == 200
    with pytest.raises(BadImage, match="is truncated"):
        load_rgb(ImageFile(tmp_path / "truncated.jpg"))


def test_a_first_look_at_large_files(tmp_path: Path) -> None:
    """The header, or the pixels, are longer than the part that is read first.

    A third file has a second picture behind the first.
    """
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", icc_profile=bytes(50_000))
    noise = Image.effect_noise((300, 200), 100)
    noise.save(tmp_path / "b.png")
    noise.save(tmp_path / "c.jpg", "MPO", save_all=True, append_images=[Image.new("L", (300, 200))])
    for name, width in (("a.jpg", 30), ("b.png", 300), ("c.jpg", 300)):
        source = ImageFile(tmp_path / name)
        assert (read_facts(source, 500).width, read_facts(source, 500).is_turned) == (width, False)
        assert load_rgb(source)[0].shape[1] == width
    assert load_rgb(ImageFile(tmp_path / "c.jpg"))[0].std() > 50  # the first picture


def test_an_exif_orientation_is_counted_and_followed_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = make_image_folder(tmp_path / "images", num_classes=2, train_per_class=1, val_per_class=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(train / class_name(0) / "0.jpg", exif=exif)
    with caplog.at_level(logging.WARNING):
        info, _ = write(train, val, tmp_path / "out")
        assert stored_image(info, 0).shape == (20, 40, 3)
        shutil.rmtree(train / class_name(1))
        shutil.rmtree(val / class_name(1))
        info, _ = write(train, val, tmp_path / "out", is_upright=True)
        assert stored_image(info, 0).shape == (40, 20, 3)
    assert (
        "1 images have an EXIF orientation: they are stored without turning, as torchvision reads them" in caplog.text
    )
    assert "1 images have an EXIF orientation: they are turned upright" in caplog.text
    assert f"only one class, '{class_name(0)}': training needs at least 2" in caplog.text


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
        pytest.raises(DataError, match=r"found 3 unusable images, but --skip-bad allows 2.*--skip-bad 3"),
    ):
        write(train, val, tmp_path / "out", skip_bad=2)
    assert [
        name in caplog.text for name in ("empty.JPEG: is empty", "notes.txt: is not a JPEG", "cut.JPEG", ".hidden")
    ] == [
        True,
        True,
        True,
        False,
    ]
    assert list((tmp_path / "out").iterdir()) == []

    infos = write(train, val, tmp_path / "out", skip_bad=3)
    assert [info.num_samples for info in infos] == [20, 10]
    assert [info.sidecar["source"]["num_skipped"] for info in infos] == [2, 1]


def test_train_and_val_must_have_the_same_class_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    (val / class_name(4)).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"val: 1 class of .*train is missing: {class_name(4)}"):
        write(train, val, tmp_path / "out")
    (val / class_name(4)).mkdir()
    with pytest.raises(DataError, match="contains no images"):
        write(train, val, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        write(train, tmp_path / "nowhere", tmp_path / "out")


def test_a_subset_is_spread_over_the_classes(folders: tuple[Path, Path]) -> None:
    train, _ = folders
    classes = [class_name(label) for label in range(5)]
    chosen = list_samples(train, classes, 7)
    assert [sample.label for sample in chosen] == [0, 0, 1, 1, 2, 3, 4]
    assert chosen == list_samples(train, classes, 7)
    assert {sample.name for sample in chosen} != {sample.name for sample in list_samples(train, classes, 7, seed=1)}
    assert len(list_samples(train, classes, 1000)) == 20


def test_a_folder_and_a_file_hold_out_the_same_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    before = sorted(train.glob("*/*"))
    how = WriteOptions(RAW_AT_64, num_workers=2, hold_out=6, seed=3)
    of_file = write_image_folders(tmp_path / "out", train=train, val=val, options=how)
    assert [info.num_samples for info in of_file] == [14, 10, 6]
    kept, held_out = split_folder(tmp_path / "split", train=train, number=6, seed=3)
    assert [held_out.num_samples, kept.num_samples, kept.classes] == [6, 14, of_file[0].classes]
    names = [{path.relative_to(info.path) for path in info.path.glob("*/*")} for info in (kept, held_out)]
    assert names[0] | names[1] == {path.relative_to(train) for path in before}
    assert not names[0] & names[1]
    again = write_image_folders(  # the sets that the folders hold are those of the files
        tmp_path / "again", train=kept.path, val=held_out.path, options=WriteOptions(RAW_AT_64, num_workers=2, seed=3)
    )
    assert [info.digest for info in again] == [of_file[0].digest, of_file[2].digest]
    assert sorted(train.glob("*/*")) == before
    with pytest.raises(ConfigError, match="train: already exists"):
        split_folder(tmp_path / "split", train=train, number=6, seed=3)
    with pytest.raises(ConfigError, match="--hold-out: expected at most 15 of the 20 training images"):
        split_folder(tmp_path / "other", train=train, number=16, seed=3)
    assert not (tmp_path / "other").exists()


def test_held_out_images_are_as_many_of_each_class_as_possible() -> None:
    labels = np.repeat([0, 1, 2], [10, 4, 1])

    def counts(number: int) -> list[int]:
        return np.bincount(labels[choose_held_out(labels, number, seed=0)], minlength=3).tolist()

    # the second class waits after half of its images; the third keeps its only one
    assert [counts(number) for number in (1, 2, 3, 4, 5, 7, 8, 9, 12)] == [
        [1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0], [3, 2, 0], [5, 2, 0], [5, 3, 0], [6, 3, 0], [9, 3, 0]
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected at most 12"):
        counts(13)


def test_write_modes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders

    def modes(options: ImageOptions, seed: int = 0) -> list[int]:
        info, _ = write(train, val, tmp_path, options=options, seed=seed)
        verify(info.path, level=2)
        return read_tables(info.path).samples["image"]["mode"].tolist()

    assert set(modes(ImageOptions("jpg", max_resolution=64))) == {JPEG}
    mixed = modes(ImageOptions("proportion", max_resolution=64))
    assert set(mixed) == {JPEG, RAW}
    assert (
        modes(ImageOptions("proportion", max_resolution=64)) == mixed
    )  # which image is compressed depends on seed and index alone
    assert modes(ImageOptions("proportion", max_resolution=64), seed=1) != mixed
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

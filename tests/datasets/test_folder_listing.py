"""A folder of images is listed by the same rules for the loader and for ``data_prep``."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.image_files import WriteOptions
from data_prep.image_folder import write_image_folders
from data_prep.images import ImageOptions
from data_prep.split_folder import split_folder
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import open_eval_loader
from pipeline.datasets.folder_listing import inspect_folder
from pipeline.datasets.sidecar import compare_class_lists
from pipeline.errors import DataError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def make_class(folder: Path, name: str, *, num_images: int = 2) -> Path:
    (folder / name).mkdir(parents=True)
    for index in range(num_images):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name / f"{index}.png")
    return folder / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    in_both(tmp_path, "ant", "bee")
    return tmp_path


def load(root: Path) -> None:
    train, val = (inspect_folder(root / split) for split in ("train", "val"))
    compare_class_lists(train, val)
    data = DataConfig(loader="folder", num_workers=1, eval_resolution=8)
    for split in ("train", "val"):
        loader = open_eval_loader(root / split, data, batch=2, device=torch.device("cpu"), channels_last=True)
        list(loader.batches())


def prepare(root: Path) -> None:
    options = WriteOptions(ImageOptions(max_resolution=64))
    write_image_folders(root / "out", train=root / "train", val=root / "val", options=options)


BOTH = pytest.mark.parametrize("read", [load, prepare])


def in_both(root: Path, *names: str, num_images: int = 2) -> None:
    for split in ("train", "val"):
        for name in names:
            make_class(root / split, name, num_images=num_images)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty_class(root: Path) -> None:
    for path in (root / "val" / "bee").iterdir():
        path.unlink()


def with_16_bits(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(root / "train" / "ant" / "2.png")


def in_two_forms(root: Path) -> None:
    make_class(root / "train", COMPOSED)
    make_class(root / "val", DECOMPOSED)


@BOTH
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: in_both(root, "a_lost+found", num_images=0), r"a_lost\+found: contains no images"),
        (empty_class, "val/bee: contains no images"),
        (lambda root: make_class(root / "train", "cat", num_images=0), "cat"),
        (lambda root: (root / "train" / "ant" / "2.png").touch(), r"ant/2\.png: is empty"),
        (
            lambda root: (root / "train" / "ant" / "2.png").symlink_to("nowhere"),
            r"ant/2\.png: is a symbolic link to a missing",
        ),
        (lambda root: (root / "train" / "ant" / "Thumbs.db").write_bytes(b"x"), r"Thumbs\.db: is not a"),
        (lambda root: make_class(root / "train" / "__MACOSX", "ant"), "__MACOSX"),
        (lambda root: make_class(root / "train", "a\x1b[2J"), "contains control characters"),
        (in_two_forms, r"'caf\\xe9' in .*'cafe\\u0301' in .*one name in two Unicode forms"),
        (lambda root: in_both(root, COMPOSED, DECOMPOSED), "the class folders .* have one name in two Unicode forms"),
        (with_16_bits, r"ant/2\.png.* at most 8 bits per channel, got 16"),
        (lambda root: cut(root / "train" / "bee" / "1.png"), r"bee/1\.png.* is truncated"),
    ],
    ids=[
        "lost+found",
        "emptied",
        "one more",
        "empty",
        "link",
        "Thumbs",
        "MACOSX",
        "control",
        "forms",
        "twins",
        "16",
        "cut",
    ],
)
def test_the_loader_is_as_strict_as_data_prep(
    root: Path, read: Callable[[Path], None], change: Callable[[Path], object], says: str
) -> None:
    change(root)
    with pytest.raises(DataError, match=says):
        read(root)
    assert not list(root.glob("out/*"))


@BOTH
def test_hidden_files_links_and_equal_forms_are_no_trouble(root: Path, read: Callable[[Path], None]) -> None:
    (root / "train" / "ant" / "._0.png").touch()
    (root / "train" / ".DS_Store").touch()
    (root / "val" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README.txt").write_text("not in a class folder")
    (root / "train" / "bee").rename(root / "elsewhere")
    (root / "train" / "bee").symlink_to(root / "elsewhere")
    in_both(root, DECOMPOSED)
    read(root)


def test_a_broken_image_is_named_with_its_class_and_what_to_do(root: Path) -> None:
    cut(root / "val" / "bee" / "1.png")
    with pytest.raises(DataError, match=r"val: evaluation, batch 1: bee/1\.png \(sample 3\)") as caught:
        load(root)
    assert caught.value.do.startswith("repair or remove it; python -m data_prep image-folder lists")


def test_a_held_out_set_may_lack_a_class(root: Path) -> None:
    held_out = split_folder(root / "divided", train=root / "train", number=1, seed=0)[1]
    assert (held_out.num_samples, held_out.classes) == (1, ["ant", "bee"])
    with pytest.raises(DataError, match="contains no images"):
        inspect_folder(held_out.path)

"""The emoji data set, from small packages of the same format: pixels, labels, splits, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.arrays import ArrayOptions
from data_prep.emoji import CLASSES, LABELS, PACKAGES, Package, emoji_key, is_val, label_of, shrink, write_emoji
from pipeline.errors import DataError

TABLE = [
    {"unified": "1F436", "subcategory": "animal-mammal"},
    {"unified": "1F34E", "subcategory": "food-fruit"},
    {
        "unified": "1F44C",
        "subcategory": "hand-fingers-open",
        "skin_variations": {"1F3FB": {"unified": "1F44C-1F3FB"}},
    },
    {"unified": "1F1E6-1F1E8", "subcategory": "country-flag"},
]
RED, BLUE = (200, 0, 0, 255), (0, 0, 100, 255)


def picture(colour: tuple[int, int, int, int], *, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGBA", size, colour).save(content, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return content.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> str:
    """Write a package and return its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Package, ...]:
    """Two sets: one with the table of labels, of PNG images; one of WebP images with longer file names."""
    one, other = replace(PACKAGES[0], file="one.tgz"), replace(PACKAGES[4], file="other.tgz")
    names = ("1f436", "1f34e", "1f44c", "1f44c-1f3fb", "1f1e6-1f1e8")
    files = {f"{one.folder}/{name}.png": picture(RED) for name in names}
    first = pack(tmp_path / one.file, files | {LABELS: json.dumps(TABLE).encode(), "package/README.md": b"x"})
    shown = {
        f"{other.folder}/1f436-fe0f.webp": picture(BLUE, size=(256, 256), kind="WEBP"),
        f"{other.folder}/1f34e.webp": picture(BLUE, size=(256, 264), kind="WEBP"),  # cut off: left out
        f"{other.folder}/1f9ff.webp": picture(BLUE, size=(256, 256), kind="WEBP"),  # not in the table
    }
    return replace(one, sha256=first), replace(other, sha256=pack(tmp_path / other.file, shown))


def write(tmp_path: Path, packages: tuple[Package, ...]) -> list[tuple[list[int], np.ndarray]]:
    """Write the data set, and return label and first pixel of every image of train and val."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    infos = write_emoji(tmp_path / "out", source=tmp_path, options=ArrayOptions(num_workers=1), packages=packages)
    found = []
    for info in infos:
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        size = info.num_samples
        loader = Loader(
            str(info.path), batch_size=size, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines
        )
        images, labels = next(iter(loader))
        found.append((labels[:, 0].tolist(), images.copy()))
    return found


def test_sets_become_splits_and_subgroups_become_classes(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    train, val = write(tmp_path, packages)
    food, animal, hand = (CLASSES.index(word) for word in ("food", "animal", "hand"))
    # by set, then by code point; skin tones are included, the flag is not
    assert train[0] == [food, animal, animal] and val[0] == [hand, hand]
    assert train[1].shape == (3, 32, 32, 3) and (train[1][:2] == RED[:3]).all() and (train[1][2] == BLUE[:3]).all()
    assert (val[1] == RED[:3]).all()


def test_all_forms_of_a_person_are_on_one_side() -> None:
    for role in ("1f680", "1f692", "1f33e", "2695", "1f373"):
        tones = ("", "-1f3fb", "-1f3fd", "-1f3ff")
        assert len({is_val(f"{person}{tone}-{role}") for person in ("1f468", "1f469", "1f9d1") for tone in tones}) == 1
    assert is_val("1f3c3") == is_val("1f3c3-1f3ff-2642")
    assert 0.2 < np.mean([is_val(f"{point:x}") for point in range(0x1F300, 0x1F600)]) < 0.3


def test_an_image_is_laid_on_white_and_shrunk_to_rounded_means() -> None:
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)  # one opaque pixel of four; the others are transparent, so white
    rgba[2:4, 2:4] = (100, 100, 100, 51)  # a fifth opaque: 0.2·100 + 0.8·255 = 224
    small = shrink(rgba)
    assert small.shape == (32, 32, 3)
    assert small[0, 0].tolist() == [194, 196, 199]  # (10 + 3·255) / 4 = 193.75, 196.25, 198.75
    assert small[1, 1].tolist() == [224] * 3
    assert small[5, 5].tolist() == [255] * 3


def test_names_and_labels() -> None:
    assert emoji_key("0033-FE0F-20E3") == emoji_key("33-20e3") == "33-20e3"
    assert emoji_key("1f469-200d-1f680") == "1f469-1f680"
    assert label_of("sky & weather") == CLASSES.index("sky")
    assert label_of("hands") == label_of("hand-prop") == CLASSES.index("hand")
    assert label_of("country-flag") is None and label_of("other-object") is None
    assert label_of("person-role") == CLASSES.index("person-role") != label_of("person") == CLASSES.index("person")
    assert label_of("person-symbol") is None and label_of("family") is None
    assert len(CLASSES) == 28 and list(CLASSES) == sorted(CLASSES)


def test_packages_that_are_missing_or_are_not_the_published_ones(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    one, other = packages

    def refused(pattern: str, packages: tuple[Package, ...] = packages) -> None:
        with pytest.raises(DataError, match=pattern):
            write_emoji(tmp_path / "out", source=tmp_path, options=ArrayOptions(num_workers=1), packages=packages)

    refused("google-16.0.0.tgz: is missing; do: run npm pack emoji-datasource-google@16.0.0 in ", PACKAGES)
    refused("is not the published package: expected sha256 0000", (replace(one, sha256="0" * 64), other))
    table = {LABELS: b"[{}]", f"{one.folder}/1f436.png": picture(RED)}
    refused("emoji.json is missing or malformed", (replace(one, sha256=pack(tmp_path / one.file, table)), other))
    table = {LABELS: json.dumps(TABLE).encode(), f"{one.folder}/1f436.png": b"\x89PNG\r\n\x1a\n"}
    refused("1f436.png is not an image", (replace(one, sha256=pack(tmp_path / one.file, table)), other))
    empty = pack(tmp_path / one.file, {LABELS: json.dumps(TABLE).encode()})
    refused("has no emoji in package/img/google/64", (replace(one, sha256=empty), other))
    cut = (tmp_path / one.file).read_bytes()[:100]
    (tmp_path / one.file).write_bytes(cut)
    refused("cannot be read", (replace(one, sha256=hashlib.sha256(cut).hexdigest()), other))
    assert not (tmp_path / "out").exists()

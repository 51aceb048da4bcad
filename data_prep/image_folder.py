"""torchvision's ImageFolder layout (``split/class/image``) to ``train.beton`` and ``val.beton``."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.image_files import Sample, WriteOptions, choose_subset, write_image_files
from data_prep.images import Source
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError, PermissionDenied


def write_image_folders(output: Path, *, train: Path, val: Path, options: WriteOptions) -> list[BetonInfo]:
    """Write both splits into ``output``. Raises DataError."""
    classes = common_classes(train, val)
    listed = {
        name: list_samples(folder, classes, options.subset, seed=options.seed)
        for name, folder in (("train", train), ("val", val))
    }
    return write_image_files(output, listed, classes=classes, kind="image-folder", options=options)


def list_classes(folder: Path) -> list[str]:
    """The names of the class folders, sorted: the position is the label, as in torchvision."""
    classes = [path.name for path in visible(folder) if path.is_dir()]
    if not classes:
        raise DataError(f"{folder}: has no class folders", do="name a folder with one folder of images per class")
    for name in classes:
        if not name.isprintable():  # among others, a name that is not UTF-8
            raise DataError(
                f"{folder}: the name of the class folder {name!a} cannot be printed", do="rename it in train and val"
            )
    return classes


def list_samples(folder: Path, classes: list[str], subset: int | None = None, *, seed: int = 0) -> list[Sample]:
    """All files of all classes (hidden ones aside), in the order of label and name; with ``subset`` that many, spread over the classes."""
    by_class = []
    for label, name in enumerate(classes):
        samples = [Sample(Source(path), label, f"{name}/{path.name}") for path in visible(folder / name)]
        if not samples:
            raise DataError(
                f"{folder / name}: holds no images", do="add images, or remove the class from train and val"
            )
        by_class.append(samples)
    return choose_subset(by_class, subset, seed=seed)


def visible(folder: Path) -> list[Path]:
    """What is in a folder, hidden files aside, by name. Raises DataError, PermissionDenied."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        raise PermissionDenied(
            f"{folder}: may not be listed by user id {os.geteuid()}", do="make it readable (chmod a+rx)"
        ) from None
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", do="name a folder with one folder of images per class") from None


def common_classes(train: Path, val: Path) -> list[str]:
    """The class folders of both. Raises DataError when they differ."""
    classes, val_classes = list_classes(train), list_classes(val)
    for names, present, absent in (
        (set(classes) - set(val_classes), train, val),
        (set(val_classes) - set(classes), val, train),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise DataError(
                f"{absent}: lacks classes that {present} has ({len(names)}): {shown}",
                do="give both the same class folders",
            )
    return classes

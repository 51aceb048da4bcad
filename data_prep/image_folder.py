"""Write data sets in torchvision's ImageFolder layout (``split/class/image``) to ``train.beton`` and ``val.beton``."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.image_files import Sample, WriteOptions, choose_subset, write_image_files
from data_prep.images import ImageSource
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError, PermissionDenied


def write_image_folders(output: Path, *, train: Path, val: Path, options: WriteOptions) -> list[BetonInfo]:
    """Write both splits into ``output``.

    Raises:
        DataError: the folders differ in their classes, or hold too many unusable images.
    """
    classes = common_classes(train, val)
    listed = {
        name: list_samples(folder, classes, options.subset, seed=options.seed)
        for name, folder in (("train", train), ("val", val))
    }
    return write_image_files(output, listed, classes=classes, kind="image-folder", options=options)


def list_classes(folder: Path) -> list[str]:
    """List the names of the class folders, sorted; a name's position is its label, as in torchvision.

    Raises:
        DataError: there are no class folders, or a name cannot be printed.
    """
    classes = [path.name for path in visible(folder) if path.is_dir()]
    if not classes:
        raise DataError(f"{folder}: has no class folders", do="pass a folder with one folder of images per class")
    for name in classes:
        if not name.isprintable():  # among others, a name that is not UTF-8
            raise DataError(
                f"{folder}: the name of the class folder {name!a} contains control characters or is not UTF-8",
                do="rename it in train and val",
            )
    return classes


def list_samples(folder: Path, classes: list[str], subset: int | None = None, *, seed: int = 0) -> list[Sample]:
    """List the files of all classes, without hidden ones, in the order of label and name.

    Args:
        folder: a split, with one folder per class.
        classes: names of the class folders, in the order of their labels.
        subset: number of files to choose, spread over the classes; None lists all.
        seed: draws the subset.

    Raises:
        DataError: a class has no files.
    """
    by_class = []
    for label, name in enumerate(classes):
        samples = [Sample(ImageSource(path), label, f"{name}/{path.name}") for path in visible(folder / name)]
        if not samples:
            raise DataError(
                f"{folder / name}: contains no images", do="add images, or remove the class from train and val"
            )
        by_class.append(samples)
    return choose_subset(by_class, subset, seed=seed)


def visible(folder: Path) -> list[Path]:
    """List the entries of a folder by name, without hidden ones.

    Raises:
        DataError: ``folder`` is not a folder.
        PermissionDenied: it may not be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        raise PermissionDenied(
            f"{folder}: may not be listed by user id {os.geteuid()}", do="make it readable (chmod a+rx)"
        ) from None
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be listed: {error.strerror}"
        raise DataError(f"{folder}: {what}", do="pass a folder with one folder of images for each class") from None


def common_classes(train: Path, val: Path) -> list[str]:
    """List the class folders, which must be the same in both splits.

    Raises:
        DataError: they differ.
    """
    classes, val_classes = list_classes(train), list_classes(val)
    for names, present, absent in (
        (set(classes) - set(val_classes), train, val),
        (set(val_classes) - set(classes), val, train),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            count = "1 class" if len(names) == 1 else f"{len(names)} classes"
            raise DataError(
                f"{absent}: {count} of {present} {'is' if len(names) == 1 else 'are'} missing: {shown}{more}",
                do="give both splits the same class folders",
            )
    return classes

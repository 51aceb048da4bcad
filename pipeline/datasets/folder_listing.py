"""List a folder of images (``class/image``, as torchvision's ImageFolder), for the loader and for ``data_prep``.

Does not import torch, so that a wrong folder is reported quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from pathlib import Path

from pipeline.datasets.sidecar import BetonInfo, classes_digest
from pipeline.errors import DataError, PermissionDenied

SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGENET = "python -m data_prep imagenet --source FOLDER reads ImageNet as published, or as on Kaggle"
LAYOUT = "pass a folder with one folder of images for each class"


def visible(folder: Path) -> list[str]:
    """List the names in a folder, sorted, without hidden ones.

    Raises:
        DataError: it is not a folder.
        PermissionDenied: it may not be listed.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except PermissionError:
        raise PermissionDenied(
            f"{folder}: may not be listed by user id {os.geteuid()}", do="make it readable (chmod a+rx)"
        ) from None
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be listed: {error.strerror}"
        raise DataError(f"{folder}: {what}", do=LAYOUT) from None


def list_classes(folder: Path) -> list[str]:
    """List the names of the class folders, sorted; a name's position is its label, as in torchvision.

    Raises:
        DataError: there are no class folders, a name cannot be printed, or two names look the same.
        PermissionDenied: the folder may not be listed.
    """
    names = visible(folder)
    classes = [name for name in names if (folder / name).is_dir()]
    if not classes:
        is_imagenet = any(name.startswith("ILSVRC2012_val_") for name in names)
        raise DataError(f"{folder}: has no class folders", do=IMAGENET if is_imagenet else LAYOUT)
    by_form: dict[str, str] = {}
    for name in classes:
        if not name.isprintable():  # among others, a name that is not UTF-8
            raise DataError(
                f"{folder}: the name of the class folder {name!a} contains control characters or is not UTF-8",
                do="rename it in train and val",
            )
        if (twin := by_form.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise DataError(
                f"{folder}: the class folders {twin!a} and {name!a} have one name in two Unicode forms",
                do="move the images of both into one folder",
            )
    return classes


def list_class(folder: Path, name: str) -> list[str]:
    """List the names of the files of one class, sorted, without hidden ones.

    Raises:
        DataError: there are none.
        PermissionDenied: the folder of the class may not be listed.
    """
    if files := visible(folder / name):
        return files
    raise DataError(
        f"{folder / name}: contains no images",
        do="add images, or remove the class from train and val; if it is not a class, move it elsewhere",
    )


def list_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """List the class names, and (file, label) of every image ordered by class and name; hidden files are left out.

    A class may have no images, which ``inspect_folder`` refuses.

    Raises:
        DataError: the folder is not one of images in class folders.
        PermissionDenied: it may not be listed.
    """
    classes = list_classes(folder)
    images = [(folder / name / file, label) for label, name in enumerate(classes) for file in visible(folder / name)]
    wrong = next((path for path, _ in images if path.suffix.lower() not in SUFFIXES), None)
    if wrong is not None:
        raise DataError(
            f"{wrong}: is not a {', '.join(SUFFIXES)} file",
            do="move it elsewhere, or write the data set with python -m data_prep",
        )
    return classes, images


def inspect_folder(folder: Path, *, may_lack_classes: bool = False) -> BetonInfo:
    """Describe the data set in a folder.

    The digest covers names, sizes and labels, not the content, which would take too long to read.

    Args:
        folder: with one folder of images for each class.
        may_lack_classes: a class folder may be empty, as in a small held-out set.

    Raises:
        DataError: the folder is not one of images in class folders, or has an empty or special file.
        PermissionDenied: it may not be listed.
    """
    classes, images = list_images(folder)
    present = {label for _, label in images}
    for label, name in enumerate(classes):
        if label not in present and not (may_lack_classes and images):
            list_class(folder, name)  # raises
    sizes = [_size_of(path) for path, _ in images]
    listed = [f"{path.relative_to(folder)} {size} {label}" for (path, label), size in zip(images, sizes, strict=True)]
    digest = hashlib.sha256("\n".join([json.dumps(classes), *listed]).encode(errors="surrogateescape")).hexdigest()
    about = {"classes_sha256": classes_digest(classes), "size_bytes": sum(sizes)}
    return BetonInfo(folder, len(images), classes, "files", 0, 0, digest, about)


def _size_of(path: Path) -> int:
    """Return the size of an image in bytes; only a regular file that is not empty can be one."""
    try:
        status = path.stat()
    except OSError as error:
        is_link = isinstance(error, FileNotFoundError) and path.is_symlink()
        what = "is a symbolic link to a missing file" if is_link else f"cannot be read: {error.strerror}"
        raise DataError(f"{path}: {what}", do="repair it, or move it elsewhere") from None
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait forever
        raise DataError(f"{path}: is not a regular file", do="move it elsewhere")
    if status.st_size == 0:
        raise DataError(f"{path}: is empty", do="copy the image again, or remove it")
    return status.st_size

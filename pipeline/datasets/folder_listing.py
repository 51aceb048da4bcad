"""List a folder of images (``class/image``, as torchvision's ImageFolder).

Does not import torch, so that a wrong folder is reported quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

from pipeline.datasets.sidecar import BetonInfo, classes_digest
from pipeline.errors import DataError, PermissionDenied

SUFFIXES = (".jpg", ".jpeg", ".png")


def list_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """List the class names, and (file, label) of every image ordered by class and name; hidden files are left out.

    Raises:
        DataError: the folder is not one of images in class folders.
        PermissionDenied: it may not be listed.
    """
    try:
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        images = [
            (folder / name / file, label)
            for label, name in enumerate(classes)
            for file in sorted(entry.name for entry in os.scandir(folder / name) if not entry.name.startswith("."))
        ]
    except PermissionError as error:
        raise PermissionDenied(
            f"{error.filename}: may not be listed by user id {os.geteuid()}", do="make it readable (chmod a+rx)"
        ) from None
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be listed: {error.strerror}"
        raise DataError(f"{folder}: {what}", do="pass a folder with one folder of images for each class") from error
    if not images:
        raise DataError(f"{folder}: contains no images", do="pass a folder with one folder of images for each class")
    wrong = next((path for path, _ in images if path.suffix.lower() not in SUFFIXES), None)
    if wrong is not None:
        raise DataError(
            f"{wrong}: is not a {', '.join(SUFFIXES)} file",
            do="move it elsewhere, or write the data set with python -m data_prep",
        )
    return classes, images


def inspect_folder(folder: Path) -> BetonInfo:
    """Describe the data set in a folder.

    The digest covers names, sizes and labels, not the content, which would take too long to read.

    Raises:
        DataError: the folder is not one of images in class folders.
        PermissionDenied: it may not be listed.
    """
    classes, images = list_images(folder)
    status = [path.stat() for path, _ in images]
    for (path, _), each in zip(images, status, strict=True):
        if not stat.S_ISREG(each.st_mode):  # reading a FIFO would wait forever
            raise DataError(f"{path}: is not a regular file", do="move it elsewhere")
    listed = [
        f"{path.relative_to(folder)} {each.st_size} {label}" for (path, label), each in zip(images, status, strict=True)
    ]
    digest = hashlib.sha256("\n".join([json.dumps(classes), *listed]).encode(errors="surrogateescape")).hexdigest()
    about = {"classes_sha256": classes_digest(classes), "size_bytes": sum(each.st_size for each in status)}
    return BetonInfo(folder, len(images), classes, "files", 0, 0, digest, about)

"""What a folder of images holds (``class/image``, as torchvision's ImageFolder).

Without torch, as everything that is checked first.
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
    """Class names, and (file, label) of every image by class and name.

    Hidden files are left out. Raises DataError, PermissionDenied.
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
        raise DataError(
            f"{folder}: {error.strerror}", do="name a folder with one folder of images per class"
        ) from error
    if not images:
        raise DataError(f"{folder}: holds no images", do="name a folder with one folder of images per class")
    wrong = next((path for path, _ in images if path.suffix.lower() not in SUFFIXES), None)
    if wrong is not None:
        raise DataError(
            f"{wrong}: is no {', '.join(SUFFIXES)}", do="move it away, or write the set with python -m data_prep"
        )
    return classes, images


def inspect_folder(folder: Path) -> BetonInfo:
    """What the folder holds.

    Its digest is of names, sizes and labels, not of content: reading all of it would take long.
    """
    classes, images = list_images(folder)
    status = [path.stat() for path, _ in images]
    for (path, _), each in zip(images, status, strict=True):
        if not stat.S_ISREG(each.st_mode):  # reading a FIFO would wait for ever
            raise DataError(f"{path}: is not a regular file", do="move it away")
    listed = [
        f"{path.relative_to(folder)} {each.st_size} {label}" for (path, label), each in zip(images, status, strict=True)
    ]
    digest = hashlib.sha256("\n".join([json.dumps(classes), *listed]).encode(errors="surrogateescape")).hexdigest()
    about = {"classes_sha256": classes_digest(classes), "size_bytes": sum(each.st_size for each in status)}
    return BetonInfo(folder, len(images), classes, "files", 0, 0, digest, about)

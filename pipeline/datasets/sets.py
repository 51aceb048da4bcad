"""What a set of images holds, whichever way it is kept."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.datasets.folder_listing import inspect_folder
from pipeline.datasets.sidecar import BetonInfo, verify
from pipeline.errors import DataError


def inspect(path: str | os.PathLike[str], *, level: int = 1, num_classes: int | None = None) -> BetonInfo:
    """Verify a .beton file to ``level``, or list a folder of images.

    Raises DataError or PermissionDenied, in one line.
    """
    path = Path(path)
    if not path.is_dir():
        return verify(path, level=level, num_classes=num_classes)
    info = inspect_folder(path)
    if num_classes is not None and info.num_classes > num_classes:
        raise DataError(
            f"{path}: has {info.num_classes} classes, the model only {num_classes}",
            do=f"set model.num_classes={info.num_classes}, or name the data set that was meant",
        )
    return info

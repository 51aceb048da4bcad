"""Divide a folder of training images into the folders ``train`` and ``held_out``, without touching the original."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from data_prep.hold_out import HELD_OUT, choose_held_out
from pipeline.datasets.folder_listing import inspect_folder, list_images
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import ConfigError, PermissionDenied, WriteError


def split_folder(output: Path, *, train: Path, number: int, seed: int) -> list[BetonInfo]:
    """Write ``output/train`` and ``output/held_out``, which have the class folders of ``train``.

    The images are hard links to the original files, or copies where the file system refuses links.
    The folders appear when they are complete. ``data_prep image-folder`` with the same numbers
    chooses the same images.

    Args:
        output: folder to write both folders to.
        train: folder with one folder of images per class.
        number: how many images to hold out.
        seed: of the choice.

    Raises:
        DataError: ``train`` is not a folder of images in class folders.
        ConfigError: there are not enough images, or ``output`` has one of the two folders already.
        WriteError, PermissionDenied: ``output`` cannot be written.
    """
    inspect_folder(train)  # refuses what is not an image before anything is written
    classes, images = list_images(train)
    is_held_out = choose_held_out(np.array([label for _, label in images]), number, seed=seed)
    folders = {"train": output / "train", HELD_OUT: output / HELD_OUT}
    partial = output / ".split.partial"  # always the same name, so that a killed command's folder is replaced
    for folder in folders.values():
        if os.path.lexists(folder):
            raise ConfigError(f"{folder}: already exists", do=f"choose another --output, or remove {folder}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name in folders:
            for of_class in classes:
                (partial / name / of_class).mkdir(parents=True)
        for (path, label), is_out in zip(images, is_held_out, strict=True):
            _link(path, partial / (HELD_OUT if is_out else "train") / classes[label] / path.name)
        for name in (HELD_OUT, "train"):  # a training set never appears without its held-out set
            (partial / name).rename(folders[name])
        partial.rmdir()
    except PermissionError as error:
        raise PermissionDenied(
            f"{output}: {error.strerror}", do="choose another --output, or make it writable"
        ) from None
    except OSError as error:
        raise WriteError(
            f"{output}: {error.strerror}", do="choose another --output, or free some disk space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [inspect_folder(folder, may_lack_classes=name == HELD_OUT) for name, folder in folders.items()]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)

"""The data sets of a run or of an evaluation, staged and verified once, before torch is imported."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.schema import Config, DataConfig
from pipeline.datasets.folder_listing import inspect_folder
from pipeline.datasets.sidecar import BetonInfo, compare_class_lists, verify
from pipeline.datasets.stage import stage_by_content
from pipeline.errors import DataError
from pipeline.superposition.rules import RULES


@dataclass(frozen=True)
class DataSets:
    """The verified data sets that a run or an evaluation reads.

    The path to read is the one in each `BetonInfo`: with ``data.stage`` it is this node's copy, and
    differs from the configured path.
    """

    train: BetonInfo | None  # None in an evaluation that does not recalibrate BatchNorm
    val: BetonInfo
    held_out: BetonInfo | None = None  # images to choose with: superpositions, the best state of a phase
    # Only in an evaluation:
    corrupted: Mapping[tuple[str, int], Path] = field(default_factory=dict)  # by corruption and severity, sorted
    cropped: frozenset[Path] = frozenset()  # the corrupted sets whose images are already cropped
    other_classes: Mapping[str, Path] = field(default_factory=dict)  # by name; images of none of the classes


def open_data_sets(config: Config) -> DataSets:
    """Stage and verify the data sets of a training run, each file once.

    Files are verified to level 1, to level 0 with ``data.verify: false``; see `sidecar.verify`.

    Raises:
        DataError: a set is missing, damaged or empty, its classes differ from those of the other
            sets, or the held-out set is the evaluation set, or the training set with ``tickets.select``.
        PermissionDenied: a set may not be read, or its copy may not be written.
        WriteError: there is not enough free disk space for a copy.
    """
    data = config.data
    level = 1 if data.verify else 0

    @functools.cache  # a held-out set may be the training set
    def open_set(path: str) -> BetonInfo:
        return stage_by_content(path, Path(data.stage), level=level) if data.stage else inspect(path, level=level)

    train, val = open_set(data.train), open_set(data.val)
    compare_class_lists(train, val)
    held_out = open_held_out(config, val, open_set)
    if held_out is not None and config.tickets.select != "last" and held_out.digest == train.digest:
        raise DataError(
            f"evaluation.held_out: {held_out.path} is the training set, expected other images for tickets.select",
            do="set it to images that are not trained on, such as held_out.beton of python -m data_prep … --hold-out N",
        )
    return DataSets(train, val, held_out)


def open_held_out(
    config: Config, val: BetonInfo, open_set: Callable[[str], BetonInfo] | None = None
) -> BetonInfo | None:
    """Verify the held-out set; None if neither the configured superposition rule nor ``tickets.select`` needs one.

    Args:
        config: names the rule and the set.
        val: the evaluation set.
        open_set: verifies the set at a path; by default `inspect`.

    Raises:
        DataError: the classes of the set differ from those of ``val``, or the set is ``val``, which
            must not be used to choose.
    """
    if not RULES[config.evaluation.superposition].is_judged and config.tickets.select == "last":
        return None
    path = Path(config.evaluation.held_out)
    info = inspect_folder(path, may_lack_classes=True) if path.is_dir() else (open_set or inspect)(str(path))
    compare_class_lists(info, val)
    if info.digest == val.digest:
        do = "set it to a held-out set (python -m data_prep … --hold-out N writes one)"
        if config.tickets.select == "last":
            do += "; the training set is accepted, but the networks have seen its images, so it judges them too well"
        raise DataError(
            f"evaluation.held_out: {info.path} is also data.val, but tickets must be chosen on other images", do=do
        )
    return info


def inspect(path: str | os.PathLike[str], *, level: int = 1) -> BetonInfo:
    """Verify a .beton file to ``level``, or list a folder of images.

    Raises:
        DataError: the set is missing or damaged.
        PermissionDenied: the set may not be read.
    """
    path = Path(path)
    return inspect_folder(path) if path.is_dir() else verify(path, level=level)


def data_digest(train: BetonInfo, data: DataConfig) -> str:
    """Return the digest of what training reads: all images and labels.

    With ``data.order: quasi_random`` it includes their positions in the file, on which the order of
    the samples depends.
    """
    if data.order != "quasi_random":
        return train.digest
    tables = train.sidecar.get("tables_sha256")  # a folder has no tables
    return hashlib.sha256(f"{train.digest} {tables}".encode()).hexdigest()


def with_num_classes(config: Config, train: BetonInfo) -> Config:
    """Return ``config`` with ``model.num_classes`` set to the number of classes of the training set.

    Raises:
        DataError: the configuration has a different number, or the set has only one class.
    """
    stated, num_classes = config.model.num_classes, train.num_classes
    if num_classes < 2:
        raise DataError(
            f"{train.path}: has {num_classes} class, expected at least 2", do="set data.train to another data set"
        )
    if stated not in (0, num_classes):
        raise DataError(
            f"{train.path}: has {num_classes} classes, but model.num_classes is {stated}",
            do=f"set model.num_classes={num_classes} (or 0, to take the number from the data set), "
            "or set data.train and data.val to the data set you meant",
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=num_classes))

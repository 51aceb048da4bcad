"""The inputs of an evaluation: folders of tickets, data sets, and the configuration that follows from them.

The configuration of the training run is not needed, because the tickets' provenance records how
images are preprocessed. Torch is not needed either, so an invalid input is reported within a second.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.config.load import config_of
from pipeline.config.schema import KEYS, Config
from pipeline.datasets.sets import DataSets, inspect, open_held_out
from pipeline.datasets.sidecar import compare_class_lists
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.runs import TicketRun
from pipeline.tickets.provenance import Provenance, require_parts
from pipeline.tickets.store import TicketStore, no_tickets

logger = logging.getLogger(__name__)

CORRUPTED = re.compile(r"([a-z][a-z0-9_]*)-([1-9]\d*)\.beton")  # fog-3.beton
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
EVAL_KEYS = ("eval_resolution", "eval_ratio", "mean", "std")
NEWER_KEYS = ("eval_resize",)  # tickets that lack them were trained with the neutral value
RECALIBRATION_KEYS = ("augmentation", "min_scale", "flip", "train_resolution")
# the keys that ``key=value`` may set; all others come from the tickets and from options
SETTINGS = (
    *(f"data.{key}" for key in (*EVAL_KEYS, *NEWER_KEYS, *RECALIBRATION_KEYS, "num_workers", "batch_timeout_seconds")),
    *(
        f"train.{key}"
        for key in (
            *("precision", "channels_last", "threads_per_rank", "deterministic", "collective_timeout_seconds"),
            *("device", "backend", "tf32", "cudnn_benchmark"),
        )
    ),
    "evaluation",
    "tracking",
)
OPTIONS = {"data.val": "--data", "data.train": "--recalibrate", "output_dir": "--output"}


def open_sets(
    val: Path, *, train: Path | None, corrupted: Path | None = None, other_classes: Sequence[Path] = ()
) -> DataSets:
    """Verify all data sets of an evaluation except the held-out set (see `with_held_out`).

    Args:
        val: the evaluation set.
        train: the training set, which recalibrates BatchNorm of superposed networks; None: no
            network is superposed.
        corrupted: a folder of files ``<corruption>-<severity>.beton``.
        other_classes: out-of-distribution sets, with images of none of the classes.

    Raises:
        DataError: a set is damaged, some sets are folders of images and others are files, or the
            sidecar of a corrupted set says that it was made from a different set.
        PermissionDenied: a set may not be read.
        ConfigError: the name of an out-of-distribution set is invalid or is used twice.
    """
    found = {} if corrupted is None else _list_corrupted(corrupted)
    for path in filter(None, (train, *found.values(), *other_classes)):
        if path.is_dir() != val.is_dir():  # one kind of loader reads them all
            kinds = ["a folder" if each.is_dir() else "a file" for each in (path, val)]
            raise DataError(
                f"{path}: is {kinds[0]}, but {val} is {kinds[1]}",
                do="pass only .beton files, or only folders of images",
            )
    of_val = inspect(val)
    of_train = None if train is None else inspect(train)
    if of_train is not None:
        compare_class_lists(of_train, of_val)
    cropped = set()
    for path in found.values():
        info = inspect(path)
        compare_class_lists(info, of_val)
        origin = info.sidecar["source"]
        if origin.get("of", of_val.digest) != of_val.digest:
            raise DataError(
                f"{path}: was made from a different set than {val}, so its images do not correspond to the clean ones",
                do="pass the set it was made from as --data, or make it again with python -m data_prep corrupt",
            )
        if origin.get("kind") == "imagenet-c" or origin.get("crop") is not None:
            cropped.add(path)
    names: dict[str, Path] = {}
    for path in other_classes:
        inspect(path)
        if not SET_NAME.fullmatch(path.stem) or path.stem in names:
            reason = "is the name of two sets" if path.stem in names else "is not a valid name for a set in the report"
            raise ConfigError(
                f"--ood {path}: {path.stem!r} {reason}",
                do="rename or link the file, using only letters, digits, _ . - in its name",
            )
        names[path.stem] = path
    return DataSets(of_train, of_val, corrupted=found, cropped=frozenset(cropped), other_classes=names)


def with_held_out(sets: DataSets, config: Config) -> DataSets:
    """Return ``sets`` with the held-out set, if the superposition rule of ``config`` needs one.

    ``sets`` is returned unchanged if the rule needs none or nothing is superposed. Raises the errors
    of `open_held_out`.
    """
    return sets if sets.train is None else replace(sets, held_out=open_held_out(config, sets.val))


def open_runs(folders: Sequence[Path], *, use: str = "all", may_differ: bool = False) -> list[TicketRun]:
    """Find the intact tickets of every folder; runs are labelled by the names of their folders.

    Args:
        folders: folders of tickets, runs, or single ticket files.
        use: ``all`` tickets of each folder, or only the ``last``.
        may_differ: accept a ticket that does not record its classes beside one that does.

    Raises:
        DataError: a folder contains no intact ticket, or tickets were trained on different classes.
        ConfigError: a ticket is given twice.
    """
    labels = _labels(folders)
    runs = []
    for folder, label in zip(folders, labels, strict=True):
        store = TicketStore(folder)
        refs = store.list()
        if not refs:
            raise no_tickets(store)
        runs.append(TicketRun(refs if use == "all" else refs[-1:], label))
    digests = [ref.content_digest for run in runs for ref in run.refs]
    if len(set(digests)) < len(digests):
        raise ConfigError("--tickets: the same ticket is passed twice", do="pass each folder once")
    first = runs[0].refs[0].provenance
    for run in runs:
        for ref in run.refs:
            of = ref.provenance
            require_parts(of, str(ref.path))
            lists = {of.class_list_digest, first.class_list_digest}
            if of.num_classes == first.num_classes and (len(lists) == 1 or (may_differ and "" in lists)):
                continue
            if of.num_classes == first.num_classes and "" in lists:
                raise DataError(
                    f"{ref.path}, {runs[0].refs[0].path}: one of them does not record the names of its classes",
                    do="import it with --like TICKET, or add --other-class-list if the labels mean the same",
                )
            raise DataError(
                f"{ref.path}: was trained on different classes than {runs[0].refs[0].path}",
                do="evaluate them separately",
            )
    return runs


def check_classes(runs: Sequence[TicketRun], sets: DataSets, *, may_differ: bool) -> None:
    """Check that the evaluation set has the classes that the tickets were trained on.

    Raises:
        DataError: the set has more classes than the tickets, or another class list. With
            ``may_differ`` only the first is an error.
    """
    of, val = runs[0].refs[0].provenance, sets.val
    if val.num_classes > of.num_classes:
        raise DataError(
            f"{val.path}: has {val.num_classes} classes, expected at most {of.num_classes}, as in the tickets",
            do="pass a set with the tickets' classes as --data",
        )
    if val.sidecar["classes_sha256"] != of.class_list_digest and not may_differ:
        raise DataError(
            f"{val.path}: its class list differs from the one the tickets were trained on",
            do="pass a set with the tickets' classes as --data, or add --other-class-list if the labels mean the same",
        )
    if val.digest == of.data_digest:
        logger.warning("%s is the set the tickets were trained on", val.path)
    if sets.train is not None and sets.train.digest != of.data_digest:
        logger.warning(
            "%s is not the set the tickets were trained on: BatchNorm is recalibrated with different images",
            sets.train.path,
        )


def check_settings(overrides: Sequence[str]) -> None:
    """Check that each ``key=value`` sets a key that an evaluation uses.

    Raises:
        ConfigError: an evaluation does not use the key, or an option sets it.
    """
    for key in (text.partition("=")[0] for text in overrides):
        if key in OPTIONS:
            raise ConfigError(f"{key}: cannot be set this way in an evaluation", do=f"use {OPTIONS[key]}")
        if key not in SETTINGS and key.partition(".")[0] not in SETTINGS:
            raise ConfigError(
                f"{key}: is not used in an evaluation",
                do=f"set one of {', '.join(SETTINGS[:-2])}, evaluation.… or tracking.…",
            )


def configure(runs: Sequence[TicketRun], sets: DataSets, *, output: Path, overrides: Sequence[str]) -> Config:
    """Build the configuration of an evaluation from the tickets' preprocessing, the sets and ``key=value`` overrides.

    Raises:
        ConfigError: an override is not used in an evaluation, the preprocessing differs between
            tickets or is missing in one, or a value is invalid.
    """
    check_settings(overrides)
    given = {text.partition("=")[0].removeprefix("data.") for text in overrides if text.startswith("data.")}
    needed = EVAL_KEYS + NEWER_KEYS + (RECALIBRATION_KEYS if sets.train is not None else ())
    known = [ref.provenance for run in runs for ref in run.refs]
    data = {key: _agreed(key, known) for key in needed if key not in given}
    for key in ("train_resolution",):  # without recalibration it is only used to count FLOPs
        if key not in needed and key not in given:
            data[key] = known[0].preprocessing.get(key) or known[0].preprocessing.get("eval_resolution", 224)
    first = known[0]
    values = {
        "name": "evaluation",
        "seed": first.seed,
        "output_dir": str(output),
        "model": {"name": first.model, "num_classes": first.num_classes, "args": first.model_args},
        "data": {
            **data,
            "loader": "folder" if sets.val.path.is_dir() else "ffcv",
            "train": str((sets.train or sets.val).path),
            "val": str(sets.val.path),
        },
        "train": {"engine": "torch"},
    }
    return config_of(f"provenance of {runs[0].refs[0].path}", values, overrides)


def _agreed(key: str, known: Sequence[Provenance]) -> Any:
    """Return the value of a preprocessing key that all tickets have in common."""
    missing = KEYS[f"data.{key}"].neutral if key in NEWER_KEYS else None
    values = [of.preprocessing.get(key, missing) for of in known]
    if None in values:
        raise ConfigError(
            f"data.{key}: is missing from the provenance of the tickets of {known[values.index(None)].parent_run}",
            do=f"set {' '.join(f'data.{each}=…' for each in EVAL_KEYS)} as in the training configuration "
            f"(with --recalibrate also {', '.join(RECALIBRATION_KEYS)})",
        )
    if any(value != values[0] for value in values):
        shown = ", ".join(dict.fromkeys(map(str, values)))
        raise ConfigError(
            f"data.{key}: the tickets were trained with different values: {shown}",
            do=f"evaluate them separately, or set data.{key}=…",
        )
    return values[0]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return a short, unique label for every folder, made from its name; an empty label if there is only one."""
    if len(folders) == 1:
        return [""]
    places = [folder.resolve() for folder in folders]
    names = [
        place.parent.name if place.name == "tickets" else place.stem if place.is_file() else place.name
        for place in places
    ]
    clean = [re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-._")[:24] or "run" for name in names]
    taken, labels = set(clean), []
    for position, name in enumerate(clean, start=1):
        if clean.count(name) > 1:
            name = next(label for label in (f"{name}-{number}" for number in count(position)) if label not in taken)
            taken.add(name)
        labels.append(name)
    return labels


def _list_corrupted(folder: Path) -> dict[tuple[str, int], Path]:
    def entries() -> Iterator[tuple[tuple[str, int], Path]]:
        for path in folder.glob("*.beton"):
            match = CORRUPTED.fullmatch(path.name)
            if match is None:
                raise DataError(
                    f"{path}: is not named <corruption>-<severity>.beton",
                    do="create corrupted sets with python -m data_prep corrupt",
                )
            yield (match[1], int(match[2])), path

    found = dict(sorted(entries())) if folder.is_dir() else {}
    if not found:
        raise DataError(
            f"{folder}: contains no corrupted sets",
            do="create them with python -m data_prep corrupt, imagenet-c or cifar-c",
        )
    return found

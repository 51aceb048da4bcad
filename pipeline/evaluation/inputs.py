"""What an evaluation is of: folders of tickets, sets of images, and the configuration that both together amount to.

Nothing here needs the configuration of the training run: how images reach the network is in the
tickets' provenance. Nor does it need torch: what cannot be evaluated is named in a second.
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
from pipeline.config.schema import Config
from pipeline.datasets.sets import DataSets, inspect, open_held_out
from pipeline.datasets.sidecar import compare_class_lists
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.runs import TicketRun
from pipeline.tickets.provenance import Provenance
from pipeline.tickets.store import TicketStore

logger = logging.getLogger(__name__)

CORRUPTED = re.compile(r"([a-z][a-z0-9_]*)-([1-9]\d*)\.beton")  # fog-3.beton
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
EVAL_KEYS = ("eval_resolution", "eval_ratio", "mean", "std")
RECALIBRATION_KEYS = ("augmentation", "min_scale", "flip", "train_resolution")
# What ``key=value`` may set; all else comes from the tickets and from options.
SETTINGS = (
    *(f"data.{key}" for key in (*EVAL_KEYS, *RECALIBRATION_KEYS, "num_workers", "batch_timeout_seconds")),
    *(
        f"train.{key}"
        for key in ("precision", "channels_last", "threads_per_rank", "deterministic", "collective_timeout_seconds")
    ),
    "evaluation",
    "tracking",
)
OPTIONS = {"data.val": "--data", "data.train": "--recalibrate", "output_dir": "--output"}


def open_sets(
    val: Path, *, train: Path | None, corrupted: Path | None = None, other_classes: Sequence[Path] = ()
) -> DataSets:
    """Verify every set of an evaluation but the held-out one, which the configuration names: see `with_held_out`.

    Args:
        val: what is evaluated on.
        train: the training set, to recalibrate BatchNorm of superposed networks; None: there are none.
        corrupted: a folder of files ``<corruption>-<severity>.beton``.
        other_classes: sets of images of none of the classes.

    Raises:
        DataError: a set is damaged, some sets are folders of images and others files, or a corrupted
            set says that it was made from another set.
        PermissionDenied: a set may not be read.
        ConfigError: two names cannot be told apart.
    """
    found = {} if corrupted is None else _list_corrupted(corrupted)
    for path in filter(None, (train, *found.values(), *other_classes)):
        if path.is_dir() != val.is_dir():  # one kind of loader reads them all
            kinds = ["a folder" if each.is_dir() else "a file" for each in (path, val)]
            raise DataError(
                f"{path}: is {kinds[0]}, and {val} is {kinds[1]}",
                do="name only .beton files, or only folders of images",
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
                f"{path}: was made from another set than {val}: clean and corrupted images would not be the same ones",
                do="name the set that it was made from, or make it again with python -m data_prep corrupt",
            )
        if origin.get("kind") == "imagenet-c" or origin.get("crop") is not None:
            cropped.add(path)
    names: dict[str, Path] = {}
    for path in other_classes:
        inspect(path)
        if not SET_NAME.fullmatch(path.stem) or path.stem in names:
            raise ConfigError(
                f"--ood {path}: the name {path.stem!r} cannot name the set in the report",
                do="rename or link the file: letters, digits, _ . -",
            )
        names[path.stem] = path
    return DataSets(of_train, of_val, corrupted=found, cropped=frozenset(cropped), other_classes=names)


def with_held_out(sets: DataSets, config: Config) -> DataSets:
    """``sets`` and the held-out set that the superposition rule of ``config`` chooses with.

    Unchanged when the rule chooses nothing, or nothing is superposed. Raises as `open_held_out`.
    """
    return sets if sets.train is None else replace(sets, held_out=open_held_out(config, sets.val))


def open_runs(folders: Sequence[Path], *, use: str = "all") -> list[TicketRun]:
    """The intact tickets of every folder, ``all`` or only the ``last`` of each; runs are told apart by the folders' names.

    Raises DataError when a folder has none or tickets are of different classes, ConfigError when one is given twice.
    """
    labels = _labels(folders)
    runs = []
    for folder, label in zip(folders, labels, strict=True):
        store = TicketStore(folder)
        refs = store.list()
        if not refs:
            why = (
                f"; the first of {len(store.left_out)} that are damaged: {store.left_out[0]}" if store.left_out else ""
            )
            raise DataError(f"{folder}: holds no intact ticket{why}", do="name a folder of ticket-….safetensors files")
        runs.append(TicketRun(refs if use == "all" else refs[-1:], label))
    digests = [ref.content_digest for run in runs for ref in run.refs]
    if len(set(digests)) < len(digests):
        raise ConfigError("--tickets: the same ticket is given twice", do="name every folder once")
    first = runs[0].refs[0].provenance
    for run in runs:
        for ref in run.refs:
            of = ref.provenance
            if (of.num_classes, of.class_list_digest) != (first.num_classes, first.class_list_digest):
                raise DataError(
                    f"{ref.path}: was trained on other classes than {runs[0].refs[0].path}",
                    do="evaluate them one by one",
                )
    return runs


def check_classes(runs: Sequence[TicketRun], sets: DataSets, *, may_differ: bool) -> None:
    """Raises DataError when the set has other classes than the tickets were trained on, or more of them."""
    of, val = runs[0].refs[0].provenance, sets.val
    if val.num_classes > of.num_classes:
        raise DataError(
            f"{val.path}: has {val.num_classes} classes, the tickets have {of.num_classes}",
            do="name the set that was meant",
        )
    if val.sidecar["classes_sha256"] != of.class_list_digest and not may_differ:
        raise DataError(
            f"{val.path}: its class list is not the one that the tickets were trained on",
            do="name the set that was meant, or, if the labels mean the same, add --other-class-list",
        )
    if val.digest == of.data_digest:
        logger.warning("%s is the set that the tickets were trained on", val.path)
    if sets.train is not None and sets.train.digest != of.data_digest:
        logger.warning(
            "%s is not the set that the tickets were trained on: BatchNorm is recalibrated with other images",
            sets.train.path,
        )


def check_settings(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a ``key=value`` that an evaluation does not use, or that has an option of its own."""
    for key in (text.partition("=")[0] for text in overrides):
        if key in OPTIONS:
            raise ConfigError(f"{key}: cannot be set this way in an evaluation", do=f"give {OPTIONS[key]}")
        if key not in SETTINGS and key.partition(".")[0] not in SETTINGS:
            raise ConfigError(
                f"{key}: an evaluation does not use it",
                do=f"choose {', '.join(SETTINGS[:-2])}, evaluation.… or tracking.…",
            )


def configure(runs: Sequence[TicketRun], sets: DataSets, *, output: Path, overrides: Sequence[str]) -> Config:
    """The configuration of this evaluation: the tickets' own preprocessing, the sets, and ``key=value`` overrides.

    Raises ConfigError as `check_settings`, and when tickets differ in their preprocessing, do not
    say, or a value is impossible.
    """
    check_settings(overrides)
    given = {text.partition("=")[0].removeprefix("data.") for text in overrides if text.startswith("data.")}
    needed = EVAL_KEYS + (RECALIBRATION_KEYS if sets.train is not None else ())
    known = [ref.provenance for run in runs for ref in run.refs]
    data = {key: _agreed(key, known) for key in needed if key not in given}
    for key in ("train_resolution",):  # for FLOPs alone where nothing is recalibrated
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
    values = [of.preprocessing.get(key) for of in known]
    if None in values:
        raise ConfigError(
            f"data.{key}: not in the provenance of the tickets of {known[values.index(None)].parent_run}",
            do=f"give {' '.join(f'data.{each}=…' for each in EVAL_KEYS)} as in the training configuration (with --recalibrate also "
            f"{', '.join(RECALIBRATION_KEYS)})",
        )
    if any(value != values[0] for value in values):
        shown = ", ".join(dict.fromkeys(map(str, values)))
        raise ConfigError(
            f"data.{key}: the tickets were trained with {shown}", do=f"evaluate them one by one, or give data.{key}=…"
        )
    return values[0]


def _labels(folders: Sequence[Path]) -> list[str]:
    """A short name for every folder, from its own name, no two alike; none when there is only one."""
    if len(folders) == 1:
        return [""]
    names = [
        folder.resolve().parent.name if folder.resolve().name == "tickets" else folder.resolve().name
        for folder in folders
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
                    do="write corrupted sets with python -m data_prep corrupt",
                )
            yield (match[1], int(match[2])), path

    found = dict(sorted(entries())) if folder.is_dir() else {}
    if not found:
        raise DataError(
            f"{folder}: no corrupted sets there",
            do="write them with python -m data_prep corrupt, imagenet-c or cifar-c",
        )
    return found

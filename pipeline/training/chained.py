"""What the chain of a run records of its settings, its metrics and its report. Does not need torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.chain import canonical
from pipeline.config.checks import leaves
from pipeline.config.schema import KEYS
from pipeline.evaluation.predictions import FILE_NAME, load_predictions, predictions_digest
from pipeline.files import sha256_of
from pipeline.tickets.verify import digest_without_run, read_verified

LAYERS = "mask/layers"  # under which the digest of the layers' densities stands
# Not chained: times and the load of the machine, which differ from run to run.
CHAINED = ("train/", "mask/", "val/")
# Keys that a resume may change, and that decide what is recorded, or when.
SETTINGS = ("checkpoint.every", "tracking.log_every_steps")
SETTINGS_SECTION = "evaluation."
FILES = ("table.txt", "report.json")  # of the report; its figures and its page hold paths and times


def is_chained(key: str) -> bool:
    """Return whether the chain records a metric."""
    return key.startswith(CHAINED)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that a resume may change and that decide what is recorded, without paths."""
    return {
        name: value
        for name, value in dict(leaves(dict(config))).items()
        if name in SETTINGS or (name.startswith(SETTINGS_SECTION) and not (name in KEYS and KEYS[name].is_path))
    }


def layers_digest(layers: Mapping[str, list[float]]) -> str:
    """Return the digest of layer -> density, R_s, rounded as the journal has them."""
    rounded = {name: [round(value, 5) for value in values] for name, values in layers.items()}
    return hashlib.sha256(canonical(rounded).encode()).hexdigest()


def files_of_report(report: Path) -> dict[str, str]:
    """Return the digest of each file of a report that is the same for equal runs.

    Predictions count by their numbers, superposed networks without the name of the run.

    Raises:
        OSError: a file is missing.
        RunError: a file is damaged.
    """
    found = {name: sha256_of(report / name) for name in FILES}
    if (report / FILE_NAME).exists():
        found[FILE_NAME] = predictions_digest(load_predictions(report / FILE_NAME))
    for path in sorted(report.glob("*.safetensors")):
        found[path.name] = digest_without_run(read_verified(path))
    return found

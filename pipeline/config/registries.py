"""The tables that own parts are added to, and from which ``imports`` lets a configuration choose.

They are asked only when there are imports, because most of them need torch. Without imports a choice is
checked against the names that the schema lists.
"""

from __future__ import annotations

import importlib

# key -> the module and the name of the table whose rows are its choices
REGISTRIES: dict[str, tuple[str, str]] = {
    "model.name": ("pipeline.models.registry", "OWN_MODELS"),
    "data.augmentation": ("pipeline.data.augment", "AUGMENTATIONS"),
    "train.optimizer": ("pipeline.engine.torch_engine", "OPTIMIZERS"),
    "sparsity.method": ("pipeline.sparse.strategy", "METHODS"),
    "sparsity.prune": ("pipeline.sparse.criteria", "PRUNE"),
    "sparsity.grow": ("pipeline.sparse.criteria", "GROW"),
    "sparsity.grow_rest": ("pipeline.sparse.criteria", "GROW"),
    "sparsity.distribution": ("pipeline.sparse.distribution", "DISTRIBUTIONS"),
    "sparsity.initial": ("pipeline.sparse.initial", "INITIAL_SCORES"),
    "plan.timetable": ("pipeline.config.timetables", "TIMETABLES"),
    "tracking.backend": ("pipeline.tracking", "TRACKERS"),
}


def choices_of(key: str) -> tuple[str, ...]:
    """Return the names that a key may have, those of imported packages included."""
    module, table = REGISTRIES[key]
    return tuple(getattr(importlib.import_module(module), table))

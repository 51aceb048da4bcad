"""Keep module paths of version 0.1 importable until version 0.3, with a warning. Standard library only."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "launchers.cli": "launchers.train_cli",
    "pipeline.assembly": "pipeline.training.assembly",
    "pipeline.checkpoint_reading": "pipeline.checkpoint.verify",
    "pipeline.checkpoint_writing": "pipeline.checkpoint.writer",
    "pipeline.cifar_models": "pipeline.models.cifar",
    "pipeline.config_checks": "pipeline.config.checks",
    "pipeline.config_reading": "pipeline.config.yaml_nodes",
    "pipeline.data.beton": "pipeline.datasets.sidecar",
    "pipeline.data.beton_format": "pipeline.datasets.beton_format",
    "pipeline.data.beton_scan": "pipeline.datasets.beton_scan",
    "pipeline.data.folder_listing": "pipeline.datasets.folder_listing",
    "pipeline.data.memory": "pipeline.datasets.memory",
    "pipeline.data.sets": "pipeline.datasets.sets",
    "pipeline.data.stage": "pipeline.datasets.stage",
    "pipeline.distributed.deepspeed_engine": "pipeline.engine.deepspeed_engine",
    "pipeline.distributed.engine": "pipeline.engine.torch_engine",
    "pipeline.distributed.last_words": "pipeline.distributed.peer_failure",
    "pipeline.distributed.reduction": "pipeline.engine.reduction",
    "pipeline.distributed.sgd": "pipeline.engine.sgd",
    "pipeline.evaluation.opening": "pipeline.evaluation.inputs",
    "pipeline.evaluation.rules": "pipeline.superposition.rules",
    "pipeline.evaluation.superposition": "pipeline.superposition.superpose",
    "pipeline.model_names": "pipeline.models.names",
    "pipeline.progress": "pipeline.training.step_log",
    "pipeline.run_record": "pipeline.training.run_record",
    "pipeline.schema": "pipeline.config.schema",
    "pipeline.tickets.reading": "pipeline.tickets.verify",
}


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} has moved to {new}; the old path works until version 0.3", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def keep_old_paths() -> None:
    """Make the old module paths importable, each with a warning on first use."""
    sys.meta_path.append(_OldPaths())

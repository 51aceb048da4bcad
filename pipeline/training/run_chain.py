"""The chain of a run that trains (:mod:`pipeline.chain`): it adds digests of the network to what is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.chain import END, FORMAT, NAME, REPORT, Chain
from pipeline.checkpoint.checkpoints import Resumed, environment
from pipeline.checkpoint.digest import network_digest
from pipeline.config.load import config_digest
from pipeline.config.schema import Config
from pipeline.distributed import session
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.training.chained import LAYERS, files_of_report, layers_digest, settings_of


class RunChain(Chain):
    """The chain of a run that trains ``model``."""

    def __init__(self, path: Path | None, position: Mapping[str, Any] | None, *, model: nn.Module) -> None:
        super().__init__(path, position)
        self._model = model

    def note_layers(self, step: int, density: Mapping[str, float], r_s: Mapping[str, float]) -> None:
        """Keep the digest of density and R_s of each layer, which the journal has in full."""
        self.note(step, {LAYERS: layers_digest({name: [density[name], r_s[name]] for name in density})})

    def report(self, step: int, sparsifier: Sparsifier) -> None:
        """Record the network after ``step`` steps, and what was reported; every rank calls this."""
        self.add(REPORT, step, state=network_digest(self._model, sparsifier))

    def end(self, step: int, report: Path) -> None:
        """Record the finished report in the folder ``report``; called on rank 0."""
        self.add(END, step, files=files_of_report(report))
        self.sync()


def open_run_chain(
    folder: Path, config: Config, *, data: Mapping[str, str], resumed: Resumed, model: nn.Module
) -> RunChain:
    """Start the chain of a run, or continue it; every rank calls this.

    Args:
        folder: the run's folder.
        config: the configuration.
        data: digests of the data sets, by what they are used for.
        resumed: where the run continues.
        model: the network that is trained.
    """
    chain = RunChain(folder / NAME if session.is_main() else None, resumed.chain, model=model)
    chain.start(
        resumed.step,
        format=FORMAT,
        config_digest=config_digest(config),
        settings=settings_of(dataclasses.asdict(config)),
        data=dict(data),
        ranks=session.world_size(),
        environment=environment(),
    )
    return chain

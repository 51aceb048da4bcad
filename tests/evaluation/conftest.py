from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.support.samples import sample_provenance
from pipeline.sparse.update import magnitude_masks
from pipeline.tickets.format import ticket_of
from pipeline.tickets.store import TicketStore

RANK_SCRIPT = Path(__file__).parent / "rank.py"


@pytest.fixture(scope="session")
def rank_module() -> ModuleType:
    """The module rank.py, whose loaders and model are also used in one process."""
    spec = importlib.util.spec_from_file_location("rank_of_tests", RANK_SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def publish(rank_module: ModuleType) -> Callable[..., TicketStore]:
    """A function that saves tickets of density 0.5, each with its own weights, R_s and cost."""

    def publish_tickets(folder: Path, num_tickets: int, *, density: float = 0.5) -> TicketStore:
        store = TicketStore(folder, owner="test")
        for index in range(num_tickets):
            model = rank_module.build_model(10 + index)
            weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
            masks = magnitude_masks(weights, round(density * sum(weight.numel() for weight in weights.values())))
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.masked_fill_(~masks[name], 0.0)
            extra = {
                "training_flops_ratio": 0.25 + 0.125 * index,
                "inference_flops_ratio": 0.5 + 0.0625 * index,
                "dense_reference_epochs": 7.5,
            }
            provenance = sample_provenance(
                index=index,
                num_classes=rank_module.NUM_CLASSES,
                phase=f"refinement-{index}",
                step=100 * (index + 1),
                samples_seen=6400 * (index + 1),
                epochs=float(index + 1),
                density=density,
                r_s=0.5 + 0.125 * index,
                seed=1,
                extra=extra,
            )
            store.save(ticket_of(model, masks, provenance=provenance))
        return store

    return publish_tickets

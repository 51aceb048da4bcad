"""Made-up tickets for measurements and tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeline.models import build
from pipeline.sparse.distribution import initial_masks
from pipeline.sparse.layers import forms_of, sparse_weights
from pipeline.sparse.strategy import METHODS
from pipeline.tickets.format import Provenance, Ticket, ticket_of

_KNOWN: dict[str, Any] = {
    "index": 0,
    "model": "tiny",
    "model_args": {"width": 4},
    "num_classes": 2,
    "method": "rigl",
    "phase": "exploration",
    "step": 100,
    "samples_seen": 12800,
    "epochs": 2.5,
    "density": 0.25,
    "r_s": 0.5,
    "seed": 3,
    "config_digest": "c0",
    "data_digest": "d0",
    "class_list_digest": "b0",
    "mask_digest": "a0",
    "parent_run": "run",
    "extra": {"training_flops_ratio": 0.25, "inference_flops_ratio": 0.125},
}


def sample_provenance(**changes: Any) -> Provenance:
    """Return a provenance with every field filled in; ``changes`` replace some."""
    return Provenance(**(_KNOWN | changes))


def network_ticket(
    name: str,
    *,
    args: dict[str, Any] | None = None,
    num_classes: int = 1000,
    resolution: int = 224,
    density: float = 0.1,
    distribution: str = "uniform",
    structure: str = "none",
    seed: int = 0,
) -> tuple[nn.Module, Ticket]:
    """Return a network with random weights, masks and BatchNorm statistics, in evaluation mode, and its ticket.

    Weights are scaled so that activations keep their size through the layers.
    """
    model = build(name, num_classes=num_classes, args=args, seed=seed).eval()
    strategy = replace(METHODS["set_itop"], distribution=distribution, structure=structure)
    weights = sparse_weights(model)
    masks = initial_masks(weights, forms_of(model), strategy, density, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in weights.items():
            active = masks[key]
            fan_in = max(1.0, float(active.sum()) / active.shape[0])
            weight.copy_(torch.randn(weight.shape, generator=generator) * active / fan_in**0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.2, 0.2),
                ):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    provenance = sample_provenance(
        model=name,
        model_args=args or {},
        num_classes=num_classes,
        density=density,
        preprocessing={"eval_resolution": resolution},
    )
    return model, ticket_of(model, masks, provenance=provenance)

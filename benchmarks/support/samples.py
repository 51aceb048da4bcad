"""Made-up tickets for measurements and tests."""

from __future__ import annotations

from typing import Any

from pipeline.tickets.format import Provenance

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

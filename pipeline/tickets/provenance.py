"""Where a ticket comes from, and the check of what a file says about it. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Where a ticket comes from. No clock and no host name: the same run gives the same ticket, to the byte."""

    index: int  # order among the tickets of a run, from 0
    model: str
    model_args: dict[str, Any]
    num_classes: int
    method: str
    phase: str
    step: int  # optimiser steps done
    samples_seen: int
    epochs: float
    density: float  # asked for; Ticket.density is what the masks have
    r_s: float  # in-time over-parameterisation rate
    seed: int
    config_digest: str
    data_digest: str
    class_list_digest: str
    mask_digest: str
    parent_run: str
    extra: dict[str, float] = field(default_factory=dict)  # training_flops_ratio, inference_flops_ratio, …
    preprocessing: dict[str, Any] = field(
        default_factory=dict
    )  # PREPROCESSING of the configuration's data; empty: not recorded


def provenance_of(stated: dict[str, Any]) -> Provenance:
    """The provenance in a ticket's header. Raises ValueError with the reason."""
    values: dict[str, Any] = {"preprocessing": {}} | stated
    allowed = {
        "int": (int,),
        "float": (int, float),
        "str": (str,),
        "dict[str, Any]": (dict,),
        "dict[str, float]": (dict,),
    }
    if values.keys() != {item.name for item in fields(Provenance)}:
        raise ValueError("provenance: fields are missing or unknown")
    for item in fields(Provenance):
        value = values[item.name]
        numbers = value.values() if item.name == "extra" and isinstance(value, dict) else [value]
        if type(value) not in allowed[str(item.type)]:
            raise ValueError(f"provenance: {item.name} is not of type {item.type}")
        if item.type in ("float", "dict[str, float]") and not all(
            type(n) in (int, float) and math.isfinite(n) for n in numbers
        ):
            raise ValueError(f"provenance: {item.name} is not a finite number")
        if item.type == "int" and not 0 <= value < 2**63:
            raise ValueError(f"provenance: {item.name} is {value}")
    if not 0 <= values["density"] <= 1 or not 0 <= values["r_s"] <= 1 or values["epochs"] < 0:
        raise ValueError("provenance: density, r_s or epochs cannot be")
    return Provenance(**values)

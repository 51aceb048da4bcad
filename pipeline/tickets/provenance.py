"""Where a ticket comes from, and the check of a file's provenance. Standard library only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import parts
from pipeline.errors import ConfigError
from pipeline.files import JSON_TYPES, describe_json
from pipeline.models.names import MODELS, TIMM

MAX_SIDE = 1 << 16  # pixels of an image
ORIGIN_MINOR = 1  # the minor version of format 2 that added ``origin``


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIDE


def _is_colour(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


# What readers compute with, of the preprocessing: what is expected, and the check. The configuration checks the rest.
_PREPROCESSING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "train_resolution": (f"a whole number from 1 to {MAX_SIDE}", _is_side),
    "eval_resolution": (f"a whole number from 1 to {MAX_SIDE}", _is_side),
    "eval_ratio": ("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "mean": ("three numbers", _is_colour),
    "std": ("three positive numbers", lambda value: _is_colour(value) and min(value) > 0),
}


@dataclass(frozen=True)
class Provenance:
    """Where a ticket comes from.

    It holds no time and no host name, so that the same run writes the same ticket, to the byte.
    """

    index: int  # position among the tickets of a run, from 0
    model: str
    model_args: dict[str, Any]
    num_classes: int
    method: str
    phase: str
    step: int  # optimiser steps done
    samples_seen: int
    epochs: float
    density: float  # as configured; Ticket.density is counted in the masks
    r_s: float  # in-time over-parameterisation rate
    seed: int
    config_digest: str
    data_digest: str
    class_list_digest: str
    mask_digest: str
    parent_run: str
    extra: dict[str, float] = field(default_factory=dict)  # training_flops_ratio, inference_flops_ratio, …
    # the keys PREPROCESSING of the configuration's data; empty: not recorded
    preprocessing: dict[str, Any] = field(default_factory=dict)
    # where initial weights or the whole network come from, if not from this run alone (docs/ticket-format.md)
    origin: dict[str, Any] = field(default_factory=dict)


def require_parts(of: Provenance, whose: str) -> None:
    """Check that the packages that a ticket's network needs have been imported; nothing is imported here.

    Args:
        of: the provenance of the ticket.
        whose: the ticket, to name in an error.

    Raises:
        ConfigError: the network is one of a package that no caller has named.
    """
    is_own = of.model not in MODELS and not of.model.startswith(TIMM)
    if is_own and (absent := parts.missing_of(of.origin)):
        raise ConfigError(
            f"{whose}: its network {of.model[:80]!r} needs {absent}, which a file cannot load",
            do=f"name it: load_ticket(…, imports=[…]), or --imports {absent} of a command",
        )


def class_list_digest(classes: Sequence[str]) -> str:
    """Return the digest of class names, by which a data set is recognised as having the classes of a ticket."""
    return hashlib.sha256(json.dumps(list(classes), ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def provenance_of(stated: dict[str, Any], *, minor: int = 0, keep: bool = False) -> tuple[Provenance, dict[str, Any]]:
    """Check and return the provenance in the header of a ticket, and the fields that are not known here.

    Args:
        stated: the header's ``provenance``.
        minor: minor version of the format.
        keep: a later minor version wrote the file, so that there may be further fields.

    Raises:
        ValueError: a field is missing, unknown or invalid.
    """
    values = dict(stated)
    if minor < ORIGIN_MINOR and "origin" in values:
        raise ValueError("provenance: unknown field 'origin'")
    values.setdefault("origin", {})
    allowed = {
        "int": (int,),
        "float": (int, float),
        "str": (str,),
        "dict[str, Any]": (dict,),
        "dict[str, float]": (dict,),
    }
    expected = {item.name for item in fields(Provenance)}
    for name in sorted(values.keys() ^ expected):
        if name in expected or not keep:
            raise ValueError(f"provenance: {'missing' if name in expected else 'unknown'} field {name[:80]!r}")
    for item in fields(Provenance):
        value = values[item.name]
        numbers = value.values() if item.name == "extra" and isinstance(value, dict) else [value]
        if type(value) not in allowed[str(item.type)]:
            kind = JSON_TYPES[allowed[str(item.type)][-1]]
            raise ValueError(f"provenance: {item.name}: expected {kind}, got {describe_json(value)}")
        if item.type in ("float", "dict[str, float]") and not all(
            type(n) in (int, float) and math.isfinite(n) for n in numbers
        ):
            raise ValueError(f"provenance: {item.name} is not a finite number")
        if item.type == "int" and not 0 <= value < 2**63:
            raise ValueError(f"provenance: {item.name}: expected 0 to {2**63 - 1}, got {value}")
    for name, maximum in (("density", 1), ("r_s", 1), ("epochs", math.inf)):
        if not 0 <= values[name] <= maximum:
            allowed_range = "at least 0" if maximum == math.inf else f"0 to {maximum}"
            raise ValueError(f"provenance: {name}: expected {allowed_range}, got {values[name]}")
    for name, (wanted, is_valid) in _PREPROCESSING.items():
        if name in values["preprocessing"] and not is_valid(value := values["preprocessing"][name]):
            raise ValueError(f"provenance: preprocessing: {name}: expected {wanted}, got {describe_json(value)}")
    known = {name: value for name, value in values.items() if name in expected}
    return Provenance(**known), {name: value for name, value in values.items() if name not in expected}

"""What a ticket says of its network beside the tensors, since version 2 of the format. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from pipeline.files import describe_json

MAX_TEXT = 1000  # characters of a class name, and of a reason


@dataclass(frozen=True)
class Network:
    """What a reader of a ticket cannot know from its tensors."""

    classes: tuple[str, ...]  # names of the classes, in the order of the outputs; () where they are not known
    parameters: int  # of the whole network, biases and norms included; a shared one counts once
    density: float  # active weights and dense parameters, over all parameters
    dense: Mapping[str, str]  # weights without a mask, biases and norms apart -> why they have none

    def with_active(self, num_active: int, num_weights: int) -> Self:
        """The same network with ``num_active`` of its ``num_weights`` sparse weights active."""
        return replace(self, density=(self.parameters - num_weights + num_active) / self.parameters)


def network_of(
    stated: dict[str, Any], *, num_classes: int, dense_parameters: Mapping[str, int], num_weights: int, keep: bool
) -> tuple[Network, dict[str, Any]]:
    """Check and return what the header of a ticket says of its network, and the fields that are not known here.

    Args:
        stated: the header's ``network``.
        num_classes: outputs of the network.
        dense_parameters: number of values of each stored parameter without a mask.
        num_weights: of all sparse weights.
        keep: a later minor version wrote the file, so that there may be further fields.

    Raises:
        ValueError: a field is missing, unknown or invalid.
    """
    known = {item.name for item in fields(Network)}
    for name in sorted(known ^ stated.keys()):
        if name in known or not keep:
            raise ValueError(f"network: {'missing' if name in known else 'unknown'} field {name[:80]!r}")
    classes, parameters, density, dense = (stated[item.name] for item in fields(Network))
    if not isinstance(classes, list):
        raise ValueError(f"network: classes: expected a list of names, got {_shown(classes)}")
    for name in classes:
        if not _is_text(name):
            expected = f"every entry to be text of at most {MAX_TEXT} characters"
            raise ValueError(f"network: classes: expected {expected}, got the entry {_shown(name)}")
    if len(classes) > num_classes:
        raise ValueError(f"network: classes: expected at most {num_classes} names, got {len(classes)}")
    most = sum(dense_parameters.values()) + num_weights
    if type(parameters) is not int or not num_weights <= parameters <= most:
        raise ValueError(f"network: parameters: expected {num_weights} to {most}, got {_shown(parameters)}")
    if type(density) not in (int, float) or not 0 <= density <= 1:
        raise ValueError(f"network: density: expected 0 to 1, got {_shown(density)}")
    if not isinstance(dense, dict) or not all(_is_text(why) for why in dense.values()):
        raise ValueError(f"network: dense: expected a reason for each dense weight, got {_shown(dense)}")
    if strange := sorted(dense.keys() - dense_parameters.keys()):
        raise ValueError(f"network: dense: expected only parameters that have no mask, got {strange[0][:80]!r}")
    return Network(tuple(classes), parameters, density, dense), {k: v for k, v in stated.items() if k not in known}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _shown(value: Any) -> str:
    return describe_json(value)[:80]

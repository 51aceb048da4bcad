"""Which weights of a model are sparse."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from pipeline.errors import ConfigError


def sparse_weights(model: nn.Module, dense_layers: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of every convolution and linear layer, by module type, in ``named_parameters`` order.

    ``dense_layers`` are name patterns (``fc.weight``, ``layer1.*``) of weights that are left alone by everything.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    owned = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owned}
    for pattern in dense_layers:
        if not fnmatch.filter(found, pattern):
            raise ConfigError(
                f"sparsity.dense_layers: no convolution or linear weight matches {pattern!r}", do=f"choose among {list(found)}"
            )
    return {name: p for name, p in found.items() if not any(fnmatch.fnmatch(name, pattern) for pattern in dense_layers)}

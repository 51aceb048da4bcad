"""Which weights of a model are sparse."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.errors import ConfigError


def owned_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that ``module`` itself, not a module in it, multiplies activations with, by attribute name.

    Found by module type: a convolution's, a linear layer's, and the input projections of attention,
    which are plain parameters of ``nn.MultiheadAttention`` (its output projection is a linear layer
    in it).
    """
    names: tuple[str, ...] = ()
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        names = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
        )  # the first, or where widths differ the other three
    return {name: weight for name in names if (weight := getattr(module, name)) is not None}


def sparse_weights(model: nn.Module, dense_layers: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions, linear layers and attention projections, in ``named_parameters`` order.

    A shared weight is listed once. Names are those of the network itself, without the prefix of
    ``torch.compile``. ``dense_layers`` are name patterns (``fc.weight``, ``layer1.*``) of weights that
    stay dense. A parametrised weight is not a parameter, so it is not found.

    Raises:
        ConfigError: for a pattern that matches none of them.
    """
    owned = {id(weight) for module in model.modules() for weight in owned_weights(module).values()}
    found = {_uncompiled(name): parameter for name, parameter in model.named_parameters() if id(parameter) in owned}
    for pattern in dense_layers:
        if not fnmatch.filter(found, pattern):
            names = list(found) if len(found) <= 6 else [*list(found)[:3], "…", *list(found)[-2:]]
            what = f"dense_layers: none of the {len(found)} convolution and linear weights matches {pattern!r}"
            raise ConfigError(what, do=f"choose among {', '.join(names)}")
    return {name: p for name, p in found.items() if not any(fnmatch.fnmatch(name, pattern) for pattern in dense_layers)}


def plain_name(name: str) -> str:
    """A parameter's name without what ``torch.compile`` and wrappers put before it."""
    return _uncompiled(name).removeprefix("module.")


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")

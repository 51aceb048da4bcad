"""Which optimisers leave a weight alone whose gradient is 0.

The gradient of a pruned weight is 0. An optimiser that works weight by weight then leaves the
weight at 0. One that mixes the weights of a layer (Muon, Shampoo, SOAP) or adds what it keeps
elsewhere (Lookahead) may not: the Sparsifier masks the weights again after each of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

# Of torch: weight 0, gradient 0 and state 0 give weight 0. Exact types, because a subclass may step differently.
KEEP_ZEROS = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
}
# By class name: the beginnings of names of state that has a weight's shape, but not its coordinates, so that a mask
# means nothing there: second moments in an eigenbasis, and the matrices of a square weight.
OTHER_COORDINATES: dict[str, tuple[str, ...]] = {
    "SOAP": ("exp_avg_sq", "GG", "Q"),
    "Shampoo": ("precond", "inv_precond", "pre_cond", "inv_pre_cond"),
}
_WRAPPED = ("optimizer", "base_optimizer", "_base_optimizer")  # where wrappers such as Lookahead hold another


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check that pruned weights can be kept at 0 under this optimiser.

    Raises:
        ConfigError: naming it.
    """
    for each in with_wrapped(optimizer):
        if isinstance(each, torch.optim.LBFGS) or "LBFGS" in type(each).__name__:
            raise ConfigError(
                f"optimizer: {type(each).__name__} moves all weights many times in one step, along directions that mix "
                "them, so that pruned weights cannot be kept at 0",
                do="use another one, such as SGD, AdamW or Muon",
            )


def keeps_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Is it known that the optimiser leaves a weight of 0 alone whose gradient is 0?

    Known are torch's own, and classes that say so with ``keeps_zeros = True``.
    """
    return type(optimizer) in KEEP_ZEROS or getattr(type(optimizer), "keeps_zeros", False) is True


def with_wrapped(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimiser, and those that it wraps."""
    inner = [getattr(optimizer, name, None) for name in _WRAPPED]
    return [optimizer, *(each for each in inner if isinstance(each, torch.optim.Optimizer) and each is not optimizer)]


def states_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """What the optimiser keeps for each entry of ``weight``: tensors of its shape and in its coordinates."""
    seen: set[int] = set()
    for each in with_wrapped(optimizer):
        foreign = OTHER_COORDINATES.get(type(each).__name__, ())
        for name, value in each.state.get(weight, {}).items():
            is_foreign = isinstance(name, str) and name.startswith(foreign)
            if isinstance(value, Tensor) and value.shape == weight.shape and not is_foreign and id(value) not in seen:
                seen.add(id(value))
                yield value

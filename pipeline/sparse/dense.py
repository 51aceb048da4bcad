"""What of a network stays dense, and the density of the whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from pipeline.sparse.layers import is_matrix, sparse_weights

NAMED = "named in dense_layers"
_SHOWN = 3  # names in a summary


@dataclass(frozen=True)
class DenseWeight:
    """A weight without a mask that has at least two dimensions longer than 1: no bias, scale or parameter of a norm."""

    name: str
    shape: tuple[int, ...]
    num_values: int
    why: str  # why it stays dense


@dataclass(frozen=True)
class DensePart:
    """The parameters of a network that have no mask. A shared one counts once."""

    weights: tuple[DenseWeight, ...]
    num_others: int  # values of biases, scales and parameters of norms

    @property
    def num_parameters(self) -> int:
        """Number of values in all of them."""
        return sum(weight.num_values for weight in self.weights) + self.num_others

    def network_density(self, num_active: int, num_weights: int) -> float:
        """Active sparse weights and dense parameters, over all parameters of the network."""
        return (num_active + self.num_parameters) / (num_weights + self.num_parameters)

    def summary(self, num_active: int, num_weights: int) -> str:
        """Say the density of the network with its dense parameters, and how many weights stay dense and which."""
        whole = f"network density {self.network_density(num_active, num_weights):.4f}"
        if not self.weights:
            return f"{whole}; dense: {self.num_others:,} biases, scales and norms"
        shown = ", ".join(f"{weight.name} ({weight.why})" for weight in self.weights[:_SHOWN])
        more = f" and {len(self.weights) - _SHOWN} more" if len(self.weights) > _SHOWN else ""
        num = sum(weight.num_values for weight in self.weights)
        stay = "1 weight stays" if len(self.weights) == 1 else f"{len(self.weights)} weights stay"
        return f"{whole}; {stay} dense ({num:,} values): {shown}{more}"

    def is_most(self, num_active: int) -> bool:
        """Do the weights that stay dense without having been named hold more values than there are active ones?"""
        return sum(weight.num_values for weight in self.weights if weight.why != NAMED) > num_active


def dense_part(model: nn.Module, sparse: Collection[str], dense_layers: Sequence[str] = ()) -> DensePart:
    """Collect the parameters of ``model`` that have no mask.

    Args:
        model: the network; it may be on any device.
        sparse: names of the weights that have one.
        dense_layers: name patterns of layers that were asked to stay dense.
    """
    can_be_sparse = sparse_weights(model)
    not_named = sparse_weights(model, dense_layers)
    owners = {id(own): module for module in model.modules() for own in module.parameters(recurse=False)}
    weights, num_others = [], 0
    for name, parameter in model.named_parameters():
        if (plain := name.replace("_orig_mod.", "")) in sparse or isinstance(parameter, nn.UninitializedParameter):
            continue
        if not is_matrix(parameter.shape):
            num_others += parameter.numel()
            continue
        if plain in can_be_sparse:
            why = "requires no gradient" if plain in not_named else NAMED
        else:
            why = _why(owners[id(parameter)])
        weights.append(DenseWeight(plain, tuple(parameter.shape), parameter.numel(), why))
    return DensePart(tuple(weights), num_others)


def _why(owner: nn.Module) -> str:
    """Why a parameter of ``owner`` cannot be sparse."""
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding"
    if isinstance(owner, ParametrizationList):
        return f"parametrised by {', '.join(type(each).__name__ for each in owner)}"
    if any(isinstance(hook, BasePruningMethod) for hook in owner._forward_pre_hooks.values()):
        return "under torch.nn.utils.prune"
    return f"a parameter of {type(owner).__name__}"

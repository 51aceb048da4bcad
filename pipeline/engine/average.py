"""The exponential moving average of a network's weights, which is updated after every optimiser step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """A copy of a network whose weights follow those of the network: aₜ = decay·aₜ₋₁ + (1 − decay)·wₜ, a₀ = w₀.

    Buffers of a floating type, which are BatchNorm's running mean and variance, are averaged in the
    same way, as timm and torchvision do: they then belong to the same steps as the averaged weights.
    Integer buffers are copied. As in the network, each rank has statistics of its own, whose mean
    over ranks is taken where they are used; the weights have the same bits on all ranks.

    The Sparsifier masks ``module`` together with the network, as one of its ``shadows``: a pruned
    weight is 0 in the average at once, and one that grows starts from 0, as it does in the network.

    Args:
        network: the network before an engine wraps it; it is copied.
        decay: in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow one step of the network. Nothing is read on the host."""
        own, others = _tensors(self.module), _tensors(network)
        is_floating = [tensor.is_floating_point() for tensor in own]
        torch._foreach_lerp_(_those(own, is_floating), _those(others, is_floating), 1 - self.decay)
        is_other = [not is_one for is_one in is_floating]
        if any(is_other):
            torch._foreach_copy_(_those(own, is_other), _those(others, is_other))

    @torch.no_grad()
    def restart(self, network: nn.Module) -> None:
        """Start from the network as it is now."""
        torch._foreach_copy_(_tensors(self.module), _tensors(network))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]


def _those(tensors: list[Tensor], are_chosen: list[bool]) -> list[Tensor]:
    return [tensor for tensor, is_chosen in zip(tensors, are_chosen, strict=True) if is_chosen]

"""What training needs of a training system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """What training needs of a training system."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def is_gradient_masked(self) -> bool:
        """After ``backward``: is the gradient 0 where the masks are not active?

        So it is when only active values have travelled.
        """

    def backward(self, images: Tensor, labels: Tensor, *, lr: float, dense: bool = True) -> tuple[Tensor, Tensor]:
        """Loss of this rank's batch and norm of the averaged gradient of all active weights, detached scalars.

        Afterwards every ``grad`` is not clipped, averaged over ranks and micro-batches, and has the
        same bits on all ranks. Without ``dense`` it may be 0 where the masks are not active
        (``train.reduction: packed``, on more than one rank). The norm is not finite when anything
        that was averaged is not.
        """

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """These weights are sparse from now on: bool, by parameter name, the same on all ranks. Between steps only."""

    def step(self) -> None:
        """Optimiser step with the gradients as they are now, clipped to ``clip_norm``; clears the gradients."""

    def skip_step(self) -> None:
        """Clear the gradients without an optimiser step: weights and optimiser state stay as they are."""

    def fragments(self, parameter: nn.Parameter) -> Sequence[tuple[Tensor, int]]:
        """What holds a part of this weight or of its optimiser state outside the model and ``optimizer.state[parameter]``.

        Each is a flat tensor and the index in ``parameter.flatten()`` where it starts. Optimiser
        state may appear with the first step.
        """

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The whole optimiser state: tensors of the parameter's shape, and ``step``, a scalar.

        All ranks call it, in the same order.
        """

    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put back a weight and what :meth:`state_of` gave, wherever the engine keeps them."""

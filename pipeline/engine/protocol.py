"""The Engine protocol: what training needs from plain torch, DDP or DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.engine.average import WeightAverage


class Engine(Protocol):
    """Backward, averaged gradients, optimiser step and optimiser state of one model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None  # of the weights, updated by every step; None: ``train.ema_decay`` is 0

    @property
    def masks_gradients(self) -> bool:
        """Whether the step that follows ``backward`` takes gradients as 0 outside the masks, as they are.

        Either only active values were sent, or the optimiser masks them on the way.
        """

    def backward(
        self, images: Tensor, labels: Tensor, *, lr: float, dense: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of this rank's batch and average them over ranks and micro-batches.

        Afterwards every ``grad`` has the same bits on all ranks and is not clipped yet.

        Args:
            images: [n, 3, height, width].
            labels: [n], or [n, classes] when labels are mixed.
            lr: learning rate of the step that follows.
            dense: average complete gradients. Without it they may be 0 outside the masks
                (``train.reduction: packed``, on more than one rank).

        Returns:
            Detached scalars: the loss of this rank's batch; the fraction of its images that are
            classified correctly, where labels are mixed as the class with the largest share; and the
            norm of the averaged gradient of all active weights, which is not finite when any
            averaged value is not.
        """

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of the sparse weights: bool, by parameter name, equal on all ranks. Call it between steps."""

    def step(self, is_bad: Tensor | None = None) -> None:
        """Clip the gradients to ``clip_norm``, step the optimiser and clear the gradients.

        Args:
            is_bad: 0.0, or 1.0 on the device if the gradients are not finite (``Session.is_bad``): weights
                and optimiser state then do not change. The host waits for it only where the optimiser
                has no fused step. None: the gradients are finite.
        """

    def skip_step(self) -> None:
        """Clear the gradients without an optimiser step; weights and optimiser state do not change."""

    def fragments(self, parameter: nn.Parameter) -> Sequence[tuple[Tensor, int]]:
        """List the tensors outside model and ``optimizer.state`` that hold a part of a weight or its optimiser state.

        Returns:
            Flat tensors, each with the index in ``parameter.flatten()`` at which it starts. Those
            of the optimiser state may appear with the first step only.
        """

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the complete optimiser state of a parameter: tensors of its shape, and the scalar ``step``.

        Call it on all ranks, in the same order.
        """

    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Restore a weight and the state that :meth:`state_of` returned, wherever the engine keeps them."""

"""Adam's bias correction for weights that grew during the run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError


class OwnStepCounts:
    """Makes torch's Adam and AdamW correct the bias of each weight's moments by the weight's own number of steps.

    A weight that grows at step t has moments of 0. Adam divides them by 1 − βᵗ, as if they had been
    averaged over t steps, so that the weight's first step is about (1 − β₁)/√(1 − β₂) ≈ 3 learning
    rates long, and the next ones are up to 6. This class computes the step of every grown weight
    again, with the number of steps since it grew, as Adam takes it in a new run (arXiv 1412.6980,
    algorithm 1). It costs about as much time as one more optimiser step.

    Args:
        optimizer: an Adam or AdamW without ``amsgrad`` and ``maximize``.
        weights: the sparse weights by name.
        warmup: steps W over which the learning rate of a grown weight rises: lr · t / W in its t-th step, lr from the
            W-th on (SMET, arXiv 2606.00888, with the counts above); 0: it has the full rate at once.

    Raises:
        ConfigError: the optimiser is of another kind.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], *, warmup: int = 0
    ) -> None:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise ConfigError(
                f"own_step_counts: expected Adam or AdamW, got {type(optimizer).__name__}",
                do="use one of them, or leave own_step_counts off",
            )
        if any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups):
            raise ConfigError("own_step_counts: does not support amsgrad and maximize", do="leave them off")
        self.optimizer = optimizer
        self.weights = weights
        self.warmup = warmup
        self.grown_at = {
            name: torch.zeros_like(weight, dtype=torch.int32) for name, weight in weights.items()
        }  # number of optimiser steps before the weight grew; 0: it was active from the start
        self._before: dict[str, Tensor] = {}
        self._num_steps: dict[str, Tensor] = {}

    def note_growth(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        """Start to count the steps of the weights that are active in ``new`` but not in ``old``."""
        for name, num_steps in self._steps().items():
            self.grown_at[name].masked_fill_(new[name] & ~old[name], num_steps)

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep a copy of the weights as they are before the optimiser step."""
        self._before = {
            name: weight.detach().clone() for name, weight in self.weights.items() if weight.grad is not None
        }
        self._num_steps = self._steps()

    @torch.no_grad()
    def after_step(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the optimiser's step of every active weight that grew during the run, unless the step was skipped."""
        groups = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        num_steps = self._steps()
        for name, before in self._before.items():
            weight = self.weights[name]
            group, state = groups[id(weight)], self.optimizer.state.get(weight)
            if not state:  # a GradScaler has skipped all steps so far
                continue
            grown_at = self.grown_at[name]
            age = (num_steps[name] - grown_at).clamp_(min=1)  # int32; 1 at the first step
            first, second = (1 - beta ** age.double() for beta in group["betas"])
            denominator = (state["exp_avg_sq"] / second).sqrt() + group["eps"]
            is_decoupled = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
            rate = group["lr"] * (age.double() / self.warmup).clamp_(max=1) if self.warmup else group["lr"]
            decayed = before * (1 - rate * group["weight_decay"]) if is_decoupled else before
            own = decayed - rate * state["exp_avg"] / (first * denominator)
            has_stepped = num_steps[name] != self._num_steps[name]  # False: a GradScaler has skipped it
            weight.copy_(torch.where((grown_at > 0) & masks[name] & has_stepped, own.to(weight.dtype), weight))
        self._before = {}

    def _steps(self) -> dict[str, Tensor]:
        """Return a copy of the optimiser's step count of each weight, by name: int32 [], where the optimiser has it."""
        counts = [self.optimizer.state.get(weight, {}).get("step") for weight in self.weights.values()]
        given = next((count for count in counts if isinstance(count, Tensor)), torch.zeros(()))
        counts = [given.new_zeros(()) if count is None else torch.as_tensor(count).to(given) for count in counts]
        return dict(zip(self.weights, torch.stack(counts).to(torch.int32).unbind(), strict=True))

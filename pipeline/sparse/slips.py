"""Detect common mistakes of a user's training loop around the optimiser step."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.errors import ConfigError
from pipeline.sparse.layers import plain_name

MIN_LOSS_SCALE = 256.0  # a GradScaler starts at 65536; a smaller divisor may be meant


class StepWatch:
    """Follows the optimiser's steps by hooks: was ``after_step`` called, and did ``before_step`` see scaled gradients?

    Needs torch's optimisers; with others that have no hooks nothing is noticed. It reads a gradient
    back to the host at the first optimiser step only.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], follow: Callable[[], None] | None
    ) -> None:
        self._follow = follow
        self._weights = list(weights.values())
        self._is_open = False  # between before_step and after_step
        self._has_stepped = False  # since before_step
        self._is_first = True  # no optimiser step has been seen, and one can be
        self._seen: tuple[nn.Parameter, Tensor] | None = None  # a weight and its gradient as before_step left it
        if not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's
            self._is_first = False
            return
        this = weakref.ref(self)  # an optimiser that outlives the Sparsifier keeps nothing of it

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (watch := this()) is not None:
                watch._before_optimizer(optimizer)

        def after(*_: Any) -> None:
            if (watch := this()) is not None and watch._is_open:
                watch._has_stepped, watch._is_first = True, False
                if watch._follow is not None:
                    watch._follow()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def require_closed(self, num_steps: int) -> None:
        """Check that ``after_step`` followed the optimiser step since the last ``before_step``.

        A step that was given up before the optimiser took it needs none.

        Args:
            num_steps: optimiser steps so far, the one in question included.

        Raises:
            ConfigError: when it did not.
        """
        if self._is_open and self._has_stepped:
            raise ConfigError(
                f"after_step was not called after optimiser step {num_steps}",
                do="call sparsifier.after_step() after every optimizer.step()",
            )
        self.close()

    def open(self) -> None:
        """The end of ``before_step``."""
        self._is_open, self._has_stepped = True, False
        if self._is_first:
            with_gradient = [weight for weight in self._weights if weight.grad is not None]
            weight = min(with_gradient, key=Tensor.numel, default=None)
            self._seen = None if weight is None or weight.grad is None else (weight, weight.grad.detach().clone())

    def require_followed(self) -> None:
        """Mask the weights again if the optimiser needs it and has no hook that did."""
        if self._follow is not None and not self._has_stepped:
            self._follow()

    def close(self) -> None:
        """``after_step`` was called, or the state is another one."""
        self._is_open, self._has_stepped, self._seen = False, False, None

    def _before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ConfigError when the gradient is unscaled only now.

        A fused optimiser unscales by itself, and a GradScaler reports that to it. Any other
        GradScaler divides the gradients, after before_step has seen them, by a power of two.
        """
        if not self._is_open:
            return
        scale = math.inf if getattr(optimizer, "grad_scale", None) is not None else 0.0
        if self._seen is not None:
            scale = max(scale, _power_of_two_between(*self._seen))
            self._seen = None
        if scale:
            by = f"by {scale:g} " if math.isfinite(scale) else ""
            raise ConfigError(
                f"the gradients were unscaled {by}between before_step and the optimiser step: before_step has seen "
                "scaled gradients",
                do="call scaler.unscale_(optimizer) before sparsifier.before_step()",
            )


def _power_of_two_between(weight: nn.Parameter, before: Tensor) -> float:
    """The power of two that the gradient of ``weight``, once ``before``, has been divided by; 0 if it is none."""
    if weight.grad is None:
        return 0.0
    index = before.abs().argmax()
    then, now = (float(tensor.reshape(-1)[index]) for tensor in (before, weight.grad.detach()))
    divisor = then / now if now else 0.0
    return divisor if MIN_LOSS_SCALE <= divisor < math.inf and math.frexp(divisor)[0] == 0.5 else 0.0


def warn_of_unlisted_average(weights: Mapping[str, nn.Parameter], shadows: Sequence[Mapping[str, Tensor]]) -> None:
    """Warn when a ``torch.optim.swa_utils.AveragedModel`` of these weights exists that is not among ``shadows``.

    It is a deep copy that has no reference to its model, so all objects of the process are looked
    through: about 0.1 s. Averages of other classes are not found.
    """
    shapes = {plain_name(name): weight.shape for name, weight in weights.items()}
    listed = {id(shadow[name]) for shadow in shadows for name in shapes}
    for found in gc.get_objects():
        if not issubclass(type(found), AveragedModel):
            continue
        held = {plain_name(name): parameter for name, parameter in found.named_parameters()}
        is_of_these = all(name in held and held[name].shape == shape for name, shape in shapes.items())
        if is_of_these and not any(id(held[name]) in listed for name in shapes):
            warnings.warn(
                "an AveragedModel of this model is not among the Sparsifier's shadows: its pruned weights keep values, "
                "so it is not sparse; do: pass it to the Sparsifier with shadows=[averaged_model]",
                UserWarning,
                stacklevel=5,  # the line that called after_step
            )
            return

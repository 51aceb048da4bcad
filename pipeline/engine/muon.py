"""Muon for matrices and AdamW for all other parameters, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for matrices and ``torch.optim.AdamW`` for the rest, with one learning rate.

    Muon's update has the root mean square of AdamW's (``match_rms_adamw``, arXiv 2502.16982), so
    that both take the learning rate and weight decay of AdamW. The groups of both are this
    optimiser's ``param_groups``, and their state is its ``state``.

    Args:
        matrices: parameters with two dimensions.
        others: groups of the other parameters, with their weight decay.
        momentum: of Muon; it is Nesterov's.
        weight_decay: of the matrices.
        betas: of AdamW.
        eps: of AdamW.
        is_fused: take AdamW's fused step.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        is_fused: bool = False,
    ) -> None:
        muon = torch.optim.Muon(
            matrices, lr=0.0, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = [torch.optim.AdamW(list(others), lr=0.0, betas=betas, eps=eps, fused=is_fused)] if others else []
        self._parts: list[torch.optim.Optimizer] = [muon, *adamw]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": 0.0})
        self._share()

    def _share(self) -> None:
        """Let both parts work on the groups and the state of this optimiser."""
        start = 0
        for part in self._parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            part.state = self.state
            start += len(part.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a loaded state, which ``load_state_dict`` hands over."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take the step of both."""
        assert closure is None, "closures are not supported"
        for part in self._parts:
            part.step()

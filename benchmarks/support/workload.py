"""What is measured: a network with fused SGD, realistic gradients and weights, and a Sparsifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.engine.sgd import OnePassSGD
from pipeline.sparse.exploration import num_active
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from pipeline.sparse.timing import DueUpdate

DENSITY = 0.1
DROP_FRACTION = 0.5


class Workload:
    """A network with dense gradients and values, which are drawn once."""

    def __init__(self, name: str, model: nn.Module, device: str = "cpu") -> None:
        self.name = name
        self.model = model.to(device)
        generator = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(p.shape, generator=generator).to(device) for p in model.parameters()]
        self.values = [torch.randn(p.shape, generator=generator).to(device) for p in model.parameters()]
        self.num_weights = sum(weight.numel() for weight in sparse_weights(model).values())

    @classmethod
    def named(cls, name: str, device: str = "cpu") -> Workload:
        return cls(name, models.build(name), device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Restore dense gradients and values: masking and updates leave zeros behind."""
        for parameter, gradient, value in zip(self.model.parameters(), self.gradients, self.values, strict=True):
            parameter.grad = gradient.clone()
            parameter.copy_(value)

    def plain_optimizer(self) -> torch.optim.SGD:
        """Return the same optimiser for a dense network of the same size, with its own parameters."""
        copies = [nn.Parameter(value.clone()) for value in self.values]
        for parameter, gradient in zip(copies, self.gradients, strict=True):
            parameter.grad = gradient.clone()
        return torch.optim.SGD(copies, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)


class Setup:
    """A workload under a sparse method. Checks between updates are off, as R1 measures them."""

    def __init__(self, workload: Workload, method: str = "rigl", scope: str = "layer") -> None:
        self.workload = workload
        workload.refresh()
        self.optimizer = OnePassSGD(workload.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        strategy = dataclasses.replace(METHODS[method], scope=scope)
        self.sparsifier = Sparsifier(
            workload.model,
            self.optimizer,
            strategy,
            density=DENSITY,
            seed=0,
            check_every=0,
            on_masks=self.use_masks,
        )
        self.num_active = num_active(self.sparsifier.masks)
        self.is_falling = strategy.initial_density is not None
        self.sparse_step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Restore a dense gradient, and values at the active weights only."""
        self.workload.refresh()
        for name, weight in self.sparsifier.weights.items():
            weight.mul_(self.sparsifier.masks[name])

    def use_scope(self, scope: str) -> None:
        """Use ``scope`` for the following updates."""
        self.sparsifier.strategy = dataclasses.replace(self.sparsifier.strategy, scope=scope)

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Give the optimiser the masks, as the engines do."""
        named = dict(self.workload.model.named_parameters())
        self.optimizer.use_masks({named[name]: mask for name, mask in masks.items()})

    def sparse_step(self) -> None:
        self.sparsifier.before_step(is_masked=self.optimizer.is_masking)
        self.optimizer.step()
        self.sparsifier.after_step()

    def mask_gradient(self) -> None:
        self.sparsifier.before_step()

    def update(self) -> None:
        """Run a topology update without the optimiser step in its middle.

        With GraNet, it removes one active weight in a hundred.
        """
        density = None
        if self.is_falling:
            density = 0.99 * self.num_active / self.workload.num_weights
            self.num_active = round(density * self.workload.num_weights)
        # as in training, where the ranks have agreed
        self.sparsifier.before_step(DueUpdate(DROP_FRACTION, density), is_finite=True)
        update = self.sparsifier.after_step()
        assert update is not None
        assert update.num_active == self.num_active, f"{update.num_active} active weights, not {self.num_active}"


class Published:
    """The published way, written from its description, on its own tensors.

    fp32 masks are multiplied into new weight and momentum tensors after every step. An update makes
    two full sorts per layer and reads each count on the host. Random growth draws one number per
    weight.
    """

    def __init__(self, setup: Setup) -> None:
        sparsifier = setup.sparsifier
        self.masks = {name: mask.float() for name, mask in sparsifier.masks.items()}
        self.weights = {name: weight.detach() * self.masks[name] for name, weight in sparsifier.weights.items()}
        self.gradients = {
            name: weight.grad.clone() for name, weight in sparsifier.weights.items() if weight.grad is not None
        }
        self.momenta = {name: torch.randn_like(weight) for name, weight in self.weights.items()}

    def mask_weights_and_momenta(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name] = self.weights[name] * mask
            self.momenta[name] = self.momenta[name] * mask

    def _prune(self, name: str) -> tuple[Tensor, int]:
        weight, mask = self.weights[name], self.masks[name]
        num_zeros = int((mask == 0).sum().item())
        num_dropped = int(DROP_FRACTION * mask.sum().item())
        _, order = torch.sort(weight.abs().view(-1))
        kept = mask.clone().view(-1)
        kept[order[: num_zeros + num_dropped]] = 0
        return kept.view(mask.shape), num_dropped

    def update_by_gradient(self) -> None:
        for name in self.masks:
            kept, num_dropped = self._prune(name)
            gradient = self.gradients[name] * (kept == 0).float()
            _, order = torch.sort(gradient.abs().view(-1), descending=True)
            kept.view(-1)[order[:num_dropped]] = 1
            self.masks[name] = kept
        self.mask_weights_and_momenta()

    def update_at_random(self) -> None:
        for name in self.masks:
            kept, num_dropped = self._prune(name)
            probability = num_dropped / max(1, int((kept == 0).sum().item()))
            coins = (torch.rand(kept.shape, device=kept.device) < probability) & (kept == 0)
            self.masks[name] = kept + coins.float()
        self.mask_weights_and_momenta()


def require_right_masks(setup: Setup) -> None:
    """Compare one update of ``setup`` with stable full sorts.

    The weakest weights are pruned, and the positions with the strongest gradients grow; ties go to
    the lower index. Random growth is only checked to be outside the kept weights and exact in number.

    Raises:
        AssertionError: naming the first layer that differs.
    """
    setup.refresh()
    sparsifier, old = setup.sparsifier, dict(setup.sparsifier.masks)
    masks = [mask.reshape(-1) for mask in old.values()]
    strengths = [weight.detach().reshape(-1).abs() for weight in sparsifier.weights.values()]
    gradients = [weight.grad.reshape(-1).abs() for weight in sparsifier.weights.values() if weight.grad is not None]
    setup.update()
    new = [mask.reshape(-1) for mask in sparsifier.masks.values()]
    names = list(old)
    if sparsifier.strategy.scope == "global":
        names, masks, strengths, gradients, new = (
            ["all layers"],
            *([torch.cat(t)] for t in (masks, strengths, gradients, new)),
        )
    for name, mask, strength, gradient, found in zip(names, masks, strengths, gradients, new, strict=True):
        num_active = int(mask.sum())
        num_kept = num_active - math.ceil(DROP_FRACTION * num_active)
        kept = _highest(torch.where(mask, strength, -1), num_kept)
        if sparsifier.strategy.grow == "gradient":
            wrong = found ^ (kept | _highest(torch.where(kept, -1, gradient), num_active - num_kept))
        else:
            wrong = kept & ~found
        assert not wrong.any(), f"{name}: {int(wrong.sum())} mask bits are not as stable sorts give them"
        assert int(found.sum()) == num_active, f"{name}: {int(found.sum())} active weights, not {num_active}"
    for name, weight in sparsifier.weights.items():
        assert not weight[~(sparsifier.masks[name] & old[name])].any(), f"{name}: a new or pruned weight is not 0"


def _highest(scores: Tensor, k: int) -> Tensor:
    """Mark the ``k`` highest scores by a stable full sort."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order[:k], True)

"""What masks cost: ResNet-50, 54 sparse tensors, 25,502,912 weights, 90% ERK, one thread. ``python -m benchmarks.masks``

The baselines are written afresh from the published methods' description: fp32 masks multiplied into new weight and momentum tensors after
every step; an update by two full sorts per layer with a host read of each threshold; random growth by one coin per weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from benchmarks.bars import Bar, arguments, ratio, report
from pipeline import models
from pipeline.sparse.exploration import num_active
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

DROP_FRACTION = 0.5
NUM_ACTIVE = 2_550_291


class Setup:
    """A ResNet-50 with fused SGD, gradients in place, and a sparsifier."""

    def __init__(self, method: str = "rigl", scope: str = "layer") -> None:
        self.model = models.build("resnet50")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        strategy = dataclasses.replace(METHODS[method], scope=scope)
        self.sparsifier = Sparsifier(self.model, self.optimizer, strategy, density=0.1, seed=0)
        generator = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(parameter.shape, generator=generator) for parameter in self.model.parameters()]
        self.values = [torch.randn(parameter.shape, generator=generator) for parameter in self.model.parameters()]
        self.refresh()
        self.optimizer.step()

    @torch.no_grad()
    def refresh(self) -> None:
        """A dense gradient, and values at the active weights, as training would have them: masking and updates leave zeros behind."""
        for parameter, gradient, value in zip(self.model.parameters(), self.gradients, self.values, strict=True):
            parameter.grad = gradient.clone()
            parameter.copy_(value)
        for name, weight in self.sparsifier.weights.items():
            weight.mul_(self.sparsifier.masks[name])

    def sparse_step(self) -> None:
        self.sparsifier.before_step()
        self.optimizer.step()
        self.sparsifier.after_step()

    def mask_gradient(self) -> None:
        self.sparsifier.before_step()

    def update(self) -> None:
        """A topology update alone, without the optimiser step in its middle."""
        self.sparsifier.before_step(DROP_FRACTION)
        self.sparsifier.after_step()
        assert num_active(self.sparsifier.masks) == NUM_ACTIVE


class Published:
    """The published way, on tensors of its own."""

    def __init__(self, setup: Setup) -> None:
        self.masks = {name: mask.float() for name, mask in setup.sparsifier.masks.items()}
        self.weights = {name: weight.detach() * self.masks[name] for name, weight in setup.sparsifier.weights.items()}
        self.gradients = {name: weight.grad.clone() for name, weight in setup.sparsifier.weights.items() if weight.grad is not None}
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
            coins = (torch.rand(kept.shape) < probability) & (kept == 0)
            self.masks[name] = kept + coins.float()
        self.mask_weights_and_momenta()


def plain_step(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    """The same optimiser on a dense network of the same size."""
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    return torch.optim.SGD(copies, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    setup = Setup()
    published = Published(setup)
    plain = plain_step(list(setup.model.parameters()))
    few = max(1, options.rounds // 2)
    bars: list[Bar] = [
        ratio("S1", setup.sparse_step, plain.step, must="≤ 1.6", aim="1.10", limit="1.006", rounds=3 * options.rounds),
        ratio("S2", published.mask_weights_and_momenta, setup.mask_gradient, must="3", aim="20", limit="190", rounds=3 * options.rounds),
        ratio("S3 layer", published.update_by_gradient, setup.update, must="5", aim="20", limit="350", rounds=few, prepare=setup.refresh),
    ]
    setup = Setup(scope="global")
    published = Published(setup)
    bars.append(
        ratio("S3 global", published.update_by_gradient, setup.update, must="4", aim="20", limit="350", rounds=few, prepare=setup.refresh)
    )
    setup = Setup("set")
    published = Published(setup)
    bars.append(ratio("S4", published.update_at_random, setup.update, must="3", aim="6", limit="100", rounds=few, prepare=setup.refresh))
    report(bars, options.json)


if __name__ == "__main__":
    main()

"""What to prune and what to grow, layer by layer, in logical, contiguous order.

A prune criterion gives a score to every active weight [n_active], and the lowest are pruned. A grow
criterion gives a score to every position [n], and the highest inactive ones grow. Scores are floats
without NaN or infinities, or integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.sparse import at_once
from pipeline.sparse.select import is_on_host, keyed_hash
from pipeline.sparse.strategy import Strategy


def magnitude(values: Tensor) -> Tensor:
    """|w|: the smallest are pruned first."""
    return values.abs()


def sign_aware(values: Tensor) -> Tensor:
    """SET: the same share of the positive and of the negative weights, those nearest to zero first.

    The score is the weight's rank by magnitude among those of its sign, over their number, in (0, 1].
    """
    order = values.abs().argsort(descending=True, stable=True)  # strongest first
    is_negative = (values < 0)[order]
    shares = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
    for is_sign in (~is_negative, is_negative):
        num = is_sign.sum()  # stays on the device
        rank = num + 1 - is_sign.cumsum(0)
        shares = torch.where(is_sign, rank.double() / num, shares)
    return torch.empty_like(shares).scatter_(0, order, shares)


def prune_scores(prune: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the scores of the active weights of each layer, [n_active] each."""
    if prune is sign_aware and parts and not is_on_host(parts[0]):
        return at_once.sign_aware(parts)
    return [prune(part) for part in parts]


# criterion -> its function; None: nothing is pruned, so that only a rising density grows anything
PRUNE: dict[str, Callable[[Tensor], Tensor] | None] = {"magnitude": magnitude, "sign_aware": sign_aware, "none": None}


@dataclass(frozen=True)
class GrowthInputs:
    """The inputs of a grow criterion, for one layer."""

    # dense, averaged over ranks and micro-batches, in the weight's shape; None if the layer took no part in the step
    gradient: Tensor | None
    average: Tensor | None  # moving average of that gradient, for criteria that read ``average``
    ever_active: Tensor  # bool, of the weight's shape
    key: int  # of (seed, update index, layer): where randomness comes from

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All there is to read."""
        return self.gradient, self.average, self.ever_active

    @property
    def num_weights(self) -> int:
        """Number of positions to score."""
        return self.ever_active.numel()

    @property
    def device(self) -> torch.device:
        """Where the scores belong."""
        return self.ever_active.device


def gradient(inputs: GrowthInputs) -> Tensor:
    """|dense gradient| (RigL, arXiv 1911.11134): the largest grow first."""
    return _absolute(inputs.gradient, inputs)


def momentum(inputs: GrowthInputs) -> Tensor:
    """|moving average of the dense gradient| (SNFS, arXiv 1907.04840).

    The optimiser's own momentum cannot be used: it is 0 at inactive weights.
    """
    return _absolute(inputs.average, inputs)


def random(inputs: GrowthInputs) -> Tensor:
    """Uniform (SET): the smallest hashes of (seed, update index, layer, position), which need no generator state."""
    return keyed_hash(inputs.key, inputs.num_weights, device=inputs.device).neg_()


def random_unfired(inputs: GrowthInputs) -> Tensor:
    """Uniform among the positions that were never active, and only then among the others."""
    never = inputs.ever_active.reshape(-1).logical_not()
    return random(inputs).bitwise_right_shift_(1).add_(never, alpha=1 << 30)


def _random_together(layers: Sequence[GrowthInputs]) -> list[Tensor]:
    hashes = at_once.hash_each([each.key for each in layers], [each.num_weights for each in layers], layers[0].device)
    torch._foreach_neg_(hashes)
    return hashes


def _random_unfired_together(layers: Sequence[GrowthInputs]) -> list[Tensor]:
    return at_once.prefer_unmarked(_random_together(layers), [each.ever_active.reshape(-1) for each in layers])


def _absolute(tensor: Tensor | None, inputs: GrowthInputs) -> Tensor:
    if tensor is None:
        return torch.zeros(inputs.num_weights, device=inputs.device)
    return tensor.detach().reshape(-1).abs()


@dataclass(frozen=True)
class Growth:
    """A row of the table of grow criteria."""

    scores: Callable[[GrowthInputs], Tensor]
    reads: Literal["nothing", "gradient", "average"] = (
        "nothing"  # the dense gradient on update steps, or its average, so on every step
    )
    # the same scores, of all layers at once, for a device on which every operation has to be launched
    together: Callable[[Sequence[GrowthInputs]], list[Tensor]] | None = None


GROW: dict[str, Growth] = {
    "gradient": Growth(gradient, reads="gradient"),
    "momentum": Growth(momentum, reads="average"),
    "random": Growth(random, together=_random_together),
    "random_unfired": Growth(random_unfired, together=_random_unfired_together),
}


class GrowthStage(NamedTuple):
    """Growth by one criterion. The stages of an update follow one another; the last has share 1."""

    scores: Mapping[str, Tensor]  # [n] for each layer, in logical order; overwritten during growth
    share: float  # share of the weights still to grow that this stage grows, in (0, 1]


def growth_stages(strategy: Strategy, inputs: Mapping[str, GrowthInputs]) -> list[GrowthStage]:
    """Score growth by each grow criterion of ``strategy``, in order."""
    return [GrowthStage(grow_scores(criterion, inputs), share) for criterion, share in strategy.grow_stages]


def grow_scores(criterion: str, inputs: Mapping[str, GrowthInputs]) -> dict[str, Tensor]:
    """Flat scores of every layer by a row of ``GROW``, in memory of their own: growing uses them up."""
    row, layers = GROW[criterion], list(inputs.values())
    if row.together is not None and layers and not is_on_host(layers[0].ever_active):
        return dict(zip(inputs, row.together(layers), strict=True))
    scores = {}
    for name, layer in inputs.items():
        found = row.scores(layer)
        # The gradient is masked before the scores are used: a view of an input will not do.
        is_view = any(
            t is not None and t.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
            for t in layer.tensors
        )
        scores[name] = found.clone() if is_view else found
    return scores


def reads(strategy: Strategy) -> frozenset[str]:
    """What the grow criteria of ``strategy`` read: of ``gradient``, ``average`` and ``nothing``."""
    return frozenset(GROW[name].reads for name, _ in strategy.grow_stages)

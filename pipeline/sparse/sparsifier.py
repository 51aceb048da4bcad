"""Binds a sparse training method to a model and an optimiser: ``before_step`` and ``after_step`` around anyone's ``optimizer.step()``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.errors import ConfigError, IntegrityError, NumericsError
from pipeline.sparse.criteria import GROW, PRUNE, GrowthInputs
from pipeline.sparse.distribution import DISTRIBUTIONS, exact_counts, random_masks
from pipeline.sparse.exploration import density, explore, r_s
from pipeline.sparse.flops import FlopMeter
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.masks import layer_digests, mask_digest
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.update import prune_and_regrow


@dataclass(frozen=True)
class TopologyUpdate:
    """What one prune-and-regrow did."""

    index: int  # 1 for the first
    drop_fraction: float
    num_new: int  # active weights that were inactive before it


class Sparsifier:
    """Owns the masks. Keeps weights and optimiser state exactly 0 where a mask is, and changes the masks when told to.

    Around an optimiser step, on every rank, with gradients already averaged over ranks and micro-batches::

        sparsifier.before_step(drop_fraction)   # None on ordinary steps; scores growth, then masks the gradient
        optimizer.step()
        update = sparsifier.after_step()        # prunes and regrows, and checks that all ranks agree

    Args:
        model: its weights must be equal on all ranks; they are multiplied by the masks here.
        optimizer: any whose per-parameter state has tensors of the parameter's shape (momentum, Adam's moments).
        strategy: the method, one of ``pipeline.sparse.strategy.METHODS`` or your own.
        density: share of active weights over all sparse layers, in (0, 1].
        seed: keys the initial masks and random growth.
        dense_layers: name patterns of weights to leave alone.
        macs: MACs per layer (``flops.layer_macs``); without it no FLOPs are counted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        strategy: Strategy,
        *,
        density: float,
        seed: int,
        dense_layers: Sequence[str] = (),
        macs: Mapping[str, int] | None = None,
    ) -> None:
        self.weights = sparse_weights(model, dense_layers)
        self.optimizer = optimizer
        self.strategy = strategy
        self.seed = seed
        self.update_index = 0
        self.steps = 0
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if not shapes:
            raise ConfigError("sparsity.dense_layers: no convolution or linear weight is left sparse", do="name fewer layers")
        counts = exact_counts(shapes, DISTRIBUTIONS[strategy.distribution](shapes, density), density)
        if dead := [name for name, count in counts.items() if count == 0]:
            raise ConfigError(
                f"sparsity.density: {density:g} leaves no weight in {', '.join(dead)}", do="raise it, or keep these layers dense"
            )
        device = next(iter(self.weights.values())).device
        self._set_masks(random_masks(shapes, counts, seed=seed, device=device))
        self.ever_active = dict(self.masks)
        self.history_digest = mask_digest(self.masks)  # chained over all updates: two runs with equal values had equal masks throughout
        self.flops = FlopMeter.of(macs, self.masks) if macs is not None else None
        self._pending: tuple[float, dict[str, Tensor]] | None = None
        self._zero_inactive()
        session.require_equal("initial masks", layer_digests(self.masks), step=0)

    # -- around the optimiser step

    def before_step(self, drop_fraction: float | None = None) -> None:
        """Score growth when an update is due (``drop_fraction`` given), then zero the gradient of inactive weights.

        Raises:
            NumericsError: on all ranks, when a gradient that growth would read is not finite.
        """
        if drop_fraction is not None and self.strategy.grow is not None:
            self._pending = (drop_fraction, self._grow_scores())
        masked = [(weight.grad, self._factors[name]) for name, weight in self._partly_active() if weight.grad is not None]
        _multiply(masked)

    @torch.no_grad()
    def after_step(self) -> TopologyUpdate | None:
        """Prune and regrow when an update is due. Returns what was done, or None on an ordinary step.

        A weight pruned and regrown at once keeps its value and momentum; a newly grown one starts at 0.

        Raises:
            IntegrityError: when the new masks are not the same on all ranks.
        """
        self.steps += 1
        if self.flops is not None:
            self.flops.step(needs_dense_gradient=self._pending is not None and self.strategy.reads_gradient)
        if self._pending is None:
            return None
        (drop_fraction, grow_scores), self._pending = self._pending, None
        old = self.masks
        new = prune_and_regrow(
            old,
            self.weights,
            grow_scores,
            prune=PRUNE[self.strategy.prune],
            drop_fraction=drop_fraction,
            scope=self.strategy.scope,
            min_active=self.strategy.min_active,
        )
        self.update_index += 1
        self._set_masks(new)
        self.ever_active = explore(self.ever_active, new)
        self._zero_inactive()
        session.require_equal("masks", layer_digests(new), step=self.steps)
        self.history_digest = hashlib.sha256((self.history_digest + mask_digest(new)).encode()).hexdigest()
        if self.flops is not None:
            self.flops.use(new)
        num_new = sum(int(torch.count_nonzero(new[name] & ~old[name])) for name in new)
        return TopologyUpdate(self.update_index, drop_fraction, num_new)

    # -- what there is to know

    @property
    def density(self) -> float:
        """Active over all weights of the sparse layers."""
        return density(self.masks)

    @property
    def r_s(self) -> float:
        """The in-time over-parameterisation rate so far."""
        return r_s(self.ever_active)

    def numbers(self) -> dict[str, int | float | str]:
        """What a checkpoint must keep beside ``masks`` and ``ever_active``."""
        numbers: dict[str, int | float | str] = {
            "update_index": self.update_index,
            "steps": self.steps,
            "history_digest": self.history_digest,
        }
        if self.flops is not None:
            numbers |= {"flops_spent": self.flops.spent}
        return numbers

    def restore(self, masks: Mapping[str, Tensor], ever_active: Mapping[str, Tensor], numbers: Mapping[str, int | float | str]) -> None:
        """Continue from what :meth:`numbers`, ``masks`` and ``ever_active`` were, with the model and optimiser already restored.

        Raises:
            IntegrityError: when a weight or optimiser state is not 0 where the masks are.
        """
        if set(masks) != set(self.weights):
            raise IntegrityError(
                "checkpoint: its masks are for other layers than this model's", do="resume with the model it was made with"
            )
        self._set_masks({name: masks[name].to(weight.device) for name, weight in self.weights.items()})
        self.ever_active = {name: ever_active[name].to(weight.device) for name, weight in self.weights.items()}
        self.update_index, self.steps = int(numbers["update_index"]), int(numbers["steps"])
        self.history_digest = str(numbers["history_digest"])
        if self.flops is not None:
            self.flops.spent = float(numbers["flops_spent"])
            self.flops.use(self.masks)
        for name, tensor, factor in self._masked_tensors():
            if not torch.equal(tensor * factor, tensor):
                raise IntegrityError(f"checkpoint: {name} has non-zero values where its mask is 0", do="resume from an older checkpoint")

    # -- internals

    def _set_masks(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        # 0 and 1 in the weights' own type and memory format: multiplying by them is five times as fast as any use of a bool mask, at the
        # price of one more copy of the weights. Layers without an inactive weight need none and cost nothing per step.
        partly_active = [name for name, mask in masks.items() if int(torch.count_nonzero(mask)) < mask.numel()]
        self._factors = {name: torch.empty_like(self.weights[name]).detach().copy_(masks[name]) for name in partly_active}

    def _partly_active(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, self.weights[name]) for name in self._factors]

    def _masked_tensors(self) -> list[tuple[str, Tensor, Tensor]]:
        """(parameter name, weight or optimiser state of its shape, its mask as 0 and 1)."""
        found = []
        for name, weight in self._partly_active():
            states = self.optimizer.state.get(weight, {}).values()
            tensors = [weight.detach(), *(s for s in states if isinstance(s, Tensor) and s.shape == weight.shape)]
            found += [(name, tensor, self._factors[name]) for tensor in tensors]
        return found

    @torch.no_grad()
    def _zero_inactive(self) -> None:
        _multiply([(tensor, factor) for _, tensor, factor in self._masked_tensors()])

    def _grow_scores(self) -> dict[str, Tensor]:
        assert self.strategy.grow is not None
        scores = {}
        for layer, (name, weight) in enumerate(self.weights.items()):
            inputs = GrowthInputs(weight.grad, weight.numel(), weight.device, self.seed, self.update_index + 1, layer)
            scores[name] = GROW[self.strategy.grow](inputs)
        if self.strategy.reads_gradient:
            self._require_finite(scores)
        return scores

    def _require_finite(self, scores: Mapping[str, Tensor]) -> None:
        totals = torch.stack([score.sum(dtype=torch.float64) for score in scores.values()])
        finite, _ = session.agree(is_finite=torch.isfinite(totals).all())
        if not finite:
            bad = [name for name, total in zip(scores, totals.tolist(), strict=True) if not math.isfinite(total)]
            where = ", ".join(bad[:3]) or "a layer of another rank"
            raise NumericsError(
                f"dense gradient is not finite at step {self.steps}: in {where}; no mask was changed",
                do="lower the learning rate, or resume from the last checkpoint with --resume auto",
            )


@torch.no_grad()
def _multiply(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Multiply every tensor by its factor, in place."""
    if pairs:
        torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])

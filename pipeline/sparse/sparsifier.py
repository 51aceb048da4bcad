"""Binds a sparse training method to a model and an optimiser: ``before_step`` and ``after_step`` around anyone's ``optimizer.step()``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.errors import IntegrityError, NumericsError
from pipeline.sparse.adam import OwnStepCounts
from pipeline.sparse.checks import POSTPONED, misfit, require_fit, require_sense
from pipeline.sparse.criteria import GROW, PRUNE, GrowthInputs, reads
from pipeline.sparse.distribution import initial_masks
from pipeline.sparse.exploration import density, explore, num_active, r_s
from pipeline.sparse.flops import FlopMeter
from pipeline.sparse.layers import plain_name, sparse_weights
from pipeline.sparse.masks import layer_digests, mask_digest, pack_masks
from pipeline.sparse.request import Request, request_of
from pipeline.sparse.select import are_nonzero_outside, count_true, key_of, multiply_by_masks
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.update import grow_to, prune_and_regrow, prune_to

AVERAGE_DECAY = 0.9  # of SNFS's moving average
Fragments = Callable[[nn.Parameter], Sequence[tuple[Tensor, int]]]


@dataclass(frozen=True)
class TopologyUpdate:
    """What one update did."""

    index: int  # 1 for the first
    drop_fraction: float
    num_new: int  # active weights that were inactive before it
    num_active: int  # after it, over all layers


@dataclass(frozen=True)
class _Due:
    """An update whose growth has been scored, waiting for the optimiser step."""

    request: Request
    growth: list[tuple[dict[str, Tensor], float]]
    idle: frozenset[
        str
    ]  # layers that took no part in the step: growth by gradient knows nothing about them, so they stay as they are


class Sparsifier:
    """Owns the masks. Keeps weights and optimiser state exactly 0 where a mask is, and changes the masks when told to.

    Around an optimiser step, on every rank, with gradients already averaged over ranks and micro-batches, unscaled and not yet clipped::

        if sparsifier.before_step(drop_fraction):  # None on ordinary steps; scores growth, then masks the gradient
            optimizer.step()
        update = sparsifier.after_step()           # prunes and regrows, and checks that all ranks agree

    Args:
        model: its weights must be equal on all ranks; they are masked here. Those that require no
            gradient are left alone.
        optimizer: any whose per-parameter state has tensors of the parameter's shape (momentum, Adam's moments).
        strategy: the method, one of ``pipeline.sparse.strategy.METHODS`` or your own.
        density: share of active weights over all sparse layers at the start, in (0, 1].
        seed: keys the initial masks and random growth.
        dense_layers: name patterns of weights to leave alone.
        macs: MACs per layer (``flops.layer_macs``); without it no FLOPs are counted.
        fragments: of a parameter, the tensors outside the model and ``optimizer.state`` that hold a
            part of it or of its optimiser state, flat, and the logical index at which each starts
            (DeepSpeed's ZeRO stage 1).
        on_masks: told of the masks, now and after every update (``Engine.use_masks``).
        shadows: models with the same parameter names, or these behind ``module.``, that follow this
            one (moving averages of the weights); they are masked after every update.
        check_every: steps between two checks of masks and weights; 0 for none.
        skip_nonfinite: what a gradient that is not finite on an update step does: False raises
            :class:`NumericsError`, True makes ``before_step`` return False and keeps the update due
            (a GradScaler skips such a step).
        own_step_counts: Adam and AdamW only: correct the bias of each weight's moments by the steps
            since it grew (``sparse.adam``).

    Raises:
        ConfigError: for a strategy, density, model or optimiser that cannot be meant.
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
        fragments: Fragments | None = None,
        on_masks: Callable[[Mapping[str, Tensor]], None] | None = None,
        shadows: Sequence[nn.Module] = (),
        check_every: int = 10,
        skip_nonfinite: bool = False,
        own_step_counts: bool = False,
    ) -> None:
        require_sense(strategy, density)
        self.weights = {
            name: weight for name, weight in sparse_weights(model, dense_layers).items() if weight.requires_grad
        }
        self._parameters = dict(model.named_parameters())
        self._shadows = [{plain_name(name): p for name, p in shadow.named_parameters()} for shadow in shadows]
        require_fit(self.weights, self._shadows, optimizer if fragments is None else None)
        self.optimizer = optimizer
        self.strategy = strategy
        self.seed = seed
        self.check_every = check_every
        self.skip_nonfinite = skip_nonfinite
        self.update_index = 0
        self.steps = 0
        self._reads = reads(strategy)
        self._fragments: Fragments = fragments or (lambda parameter: ())
        self._on_masks = on_masks
        self._due: _Due | None = None
        self._postponed: Request | None = None
        self._is_skipped = False
        self._use(initial_masks(self.weights, strategy, density, seed=seed))
        self.ever_active = dict(self.masks)
        self.history_digest = (
            self._digest
        )  # chained over all updates: two runs with equal values had equal masks throughout
        self.flops = FlopMeter.of(macs, self.masks) if macs is not None else None
        averaged = self.weights.items() if "average" in self._reads else ()
        self.average = {name: torch.zeros_like(weight).detach() for name, weight in averaged}
        self._own_steps = OwnStepCounts(optimizer, self.weights) if own_step_counts else None
        self._zero_inactive()
        session.require_equal("initial masks", self._layer_digests, step=0)

    # -- around the optimiser step

    def needs_dense_gradient(self, drop_fraction: float | None = None, density: float | None = None) -> bool:
        """Will ``before_step`` with the same arguments read the gradient where the masks are not active?

        Where it does not, the values there need not be averaged over ranks, and may be anything.
        """
        request = self._requested(drop_fraction, density)
        return "average" in self._reads or ("gradient" in self._reads and request is not None and request.needs_scores)

    def before_step(
        self,
        drop_fraction: float | None = None,
        density: float | None = None,
        *,
        is_finite: bool = False,
        is_masked: bool = False,
    ) -> bool:
        """Score growth when an update is due, then zero the gradient of inactive weights.

        Args:
            drop_fraction: share of the active weights to replace after this step, in [0, 1]; None or 0: none.
            density: the share of active weights over all layers after this update, in (0, 1]; None leaves it as it is.
            is_finite: the ranks have already agreed that loss and gradients are finite, so that
                this need not ask them again.
            is_masked: the gradient is 0 where the masks are not active, as it is when only its
                active values have travelled (``Engine.is_gradient_masked``), so that this need not
                zero it again.

        Returns:
            True when the optimiser must step; False when it must not, because the update takes the place of the step
            (``Strategy.replaces_step``) or because a gradient is not finite and ``skip_nonfinite`` is set.

        Raises:
            NumericsError: on all ranks, when a weight or gradient is not finite on an update step. No mask has changed.
        """
        self._due, self._is_skipped = None, False
        request = self._requested(drop_fraction, density)
        if not is_finite and (request is not None or self.average):
            self._is_skipped = not self._is_finite()
        self._postponed = request if self._is_skipped else None
        if self._is_skipped:
            return False
        for name, average in self.average.items():
            if (gradient := self.weights[name].grad) is not None:
                average.lerp_(gradient, 1 - AVERAGE_DECAY)
        if request is not None:
            stages = self.strategy.grow_stages if request.needs_scores else ()
            blind = (
                {name for name, weight in self.weights.items() if weight.grad is None}
                if "gradient" in self._reads
                else ()
            )
            self._due = _Due(request, [(self._grow_scores(name), share) for name, share in stages], frozenset(blind))
        # Last layer first: the optimiser begins with the first one, whose gradient is then still in the cache.
        layers = () if is_masked else reversed(self._partly_active.items())
        multiply_by_masks((weight.grad, self.masks[name]) for name, weight in layers if weight.grad is not None)
        if self._own_steps is not None:
            self._own_steps.before_step()
        return not (self.strategy.replaces_step and self._due is not None)

    @torch.no_grad()
    def after_step(self) -> TopologyUpdate | None:
        """Prune and regrow when an update is due. Returns what was done, or None on an ordinary step.

        A weight pruned and regrown at once keeps its value and momentum; a newly grown one starts at 0.

        Raises:
            IntegrityError: when the masks are not the same on all ranks, or are not what they were,
                or a pruned weight is not 0.
        """
        if self._is_skipped:
            return None
        self.steps += 1
        if self.flops is not None:
            is_read = self._due is not None and bool(self._due.growth) and "gradient" in self._reads
            self.flops.step(needs_dense_gradient=is_read or "average" in self._reads)
        if self._own_steps is not None and not (self.strategy.replaces_step and self._due is not None):
            self._own_steps.after_step(self.masks)
        if self._due is not None:
            due, self._due = self._due, None
            return self._update(due)
        if self.check_every and self.steps % self.check_every == 0:
            self.check()
        return None

    @torch.no_grad()
    def check(self) -> None:
        """All ranks together: are the masks the same everywhere and as the last update left them, and the pruned weights 0?

        Raises:
            IntegrityError: naming the first layer, and the ranks that differ.
        """
        digests = layer_digests(pack_masks(self.masks))
        session.require_equal("masks", digests, step=self.steps)
        problem = ""
        if changed := [name for name in digests if digests[name] != self._layer_digests[name]]:
            problem = f"the mask of {changed[0]} has changed since update {self.update_index}, without an update"
        elif dirty := self._dirty_weights():
            problem = f"{dirty[0]} has non-zero values where its mask is 0"
        error = IntegrityError(
            f"{problem} (check after step {self.steps})",
            do="do not go on from this state: restart from the last checkpoint, and find what wrote to it",
        )
        session.raise_together(error if problem else None)

    # -- what there is to know

    @property
    def density(self) -> float:
        """Active over all weights of the sparse layers."""
        return density(self.masks)

    @property
    def r_s(self) -> float:
        """The in-time over-parameterisation rate so far."""
        return r_s(self.ever_active)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model and the optimiser; ``restore(**state)`` takes it back."""
        return {
            "masks": self.masks,
            "ever_active": self.ever_active,
            "numbers": self.numbers(),
            "tensors": self.tensors(),
        }

    def numbers(self) -> dict[str, int | float | str]:
        """Counters and digests."""
        numbers: dict[str, int | float | str] = {
            "update_index": self.update_index,
            "steps": self.steps,
            "history_digest": self.history_digest,
            "mask_digest": self._digest,
            "seed": self.seed,
        }
        if self._postponed is not None:
            numbers |= {f"{POSTPONED}{key}": value for key, value in vars(self._postponed).items() if value is not None}
        if self.flops is not None:
            numbers |= {"flops_spent": self.flops.spent}
        return numbers

    def tensors(self) -> dict[str, Tensor]:
        """Dense tensors, by name: SNFS's moving average, the steps at which weights grew."""
        grown_at = self._own_steps.grown_at if self._own_steps is not None else {}
        return {f"average/{name}": t for name, t in self.average.items()} | {
            f"grown_at/{name}": t for name, t in grown_at.items()
        }

    def restore(
        self,
        masks: Mapping[str, Tensor],
        ever_active: Mapping[str, Tensor],
        numbers: Mapping[str, int | float | str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Continue from what :meth:`state_dict` was, with the model and optimiser already restored.

        All ranks together.

        Raises:
            IntegrityError: when the state is another model's, method's or seed's, when masks are
                not what they were, or when a weight is not 0 where they are. On all ranks, if it is
                one rank's.
        """
        own = self.state_dict()
        problem = misfit({"masks": masks, "ever_active": ever_active, "numbers": numbers, "tensors": tensors}, own)
        if not problem:
            self._use(dict(masks))
            self.ever_active = {name: ever_active[name].to(weight.device) for name, weight in self.weights.items()}
            self.update_index, self.steps = int(numbers["update_index"]), int(numbers["steps"])
            self.history_digest = str(numbers["history_digest"])
            self._due, self._is_skipped, self._postponed = None, False, None
            if postponed := {
                key.removeprefix(POSTPONED): value for key, value in numbers.items() if key.startswith(POSTPONED)
            }:
                self._postponed = Request(**postponed)  # type: ignore[arg-type]
            if self.flops is not None:
                self.flops.spent = float(numbers["flops_spent"])
                self.flops.use(self.masks)
            for name, tensor in own["tensors"].items():
                tensor.copy_(tensors[name])
            if self._digest != numbers["mask_digest"]:
                problem = "its masks are not those that were saved"
            elif dirty := self._dirty_weights():
                problem = f"{dirty[0]} has non-zero values where its mask is 0"
        error = IntegrityError(
            f"checkpoint: {problem}", do="resume from an older checkpoint, with the model, method and seed of this one"
        )
        session.raise_together(error if problem else None)
        self._zero_inactive()  # of optimiser state, too, whose rest may be something else than 0 (Rprop's step sizes)
        history = int(
            hashlib.sha256(f"{self.history_digest} {self.update_index} {self.steps}".encode()).hexdigest()[:15], 16
        )
        session.require_equal("restored masks", {**self._layer_digests, "their history": history}, step=self.steps)

    # -- internals

    def _requested(self, drop_fraction: float | None, density: float | None) -> Request | None:
        """The update to make, one that was postponed included; None where nothing would change."""
        if drop_fraction is None and density is None:
            return self._postponed
        num_weights = sum(mask.numel() for mask in self.masks.values())
        return request_of(self.strategy, drop_fraction, density, num_active=self._num_active, num_weights=num_weights)

    def _use(self, masks: dict[str, Tensor]) -> None:
        """Take ``masks`` into use, in the memory format of the weights, where applying them is fastest."""
        self.masks = {
            name: torch.empty_like(w, dtype=torch.bool).copy_(masks[name]) for name, w in self.weights.items()
        }
        packed = pack_masks(self.masks)
        self._layer_digests = layer_digests(packed)
        self._digest = mask_digest(self.masks, packed)
        counts = count_true(list(self.masks.values()))
        self._num_active = sum(counts)
        self._partly_active = {
            name: w for (name, w), count in zip(self.weights.items(), counts, strict=True) if count < w.numel()
        }
        if self._on_masks is not None:
            self._on_masks(self.masks)

    def _update(self, due: _Due) -> TopologyUpdate:
        strategy, old, new, request = self.strategy, self.masks, dict(self.masks), due.request
        before, target = self._num_active, request.num_active
        if target is not None and target < before:
            new = prune_to(new, self.weights, target, min_active=strategy.min_active)
        moving = {name: mask for name, mask in new.items() if name not in due.idle}
        if due.growth and request.drop_fraction > 0 and moving:
            new |= prune_and_regrow(
                moving,
                self.weights,
                due.growth,
                drop_fraction=request.drop_fraction,
                scope=strategy.scope,
                prune=PRUNE[strategy.prune],
                min_active=strategy.min_active,
                structure=strategy.structure,
            )
        if target is not None and target > before and moving:
            moving = {name: new[name] for name in moving}
            num_idle = sum(count_true([new[name] for name in due.idle])) if due.idle else 0
            room = sum(mask.numel() for mask in moving.values())
            new |= grow_to(moving, due.growth, min(room, target - num_idle), scope=strategy.scope)
        self.update_index += 1
        self._use(new)
        self.ever_active = explore(self.ever_active, self.masks)
        self._zero_inactive()
        session.require_equal("masks", self._layer_digests, step=self.steps)
        self.history_digest = hashlib.sha256((self.history_digest + self._digest).encode()).hexdigest()
        if self.flops is not None:
            self.flops.use(self.masks)
        if self._own_steps is not None:
            self._own_steps.note_growth(old, self.masks)
        num_kept = num_active({name: self.masks[name] & old[name] for name in old})
        return TopologyUpdate(self.update_index, request.drop_fraction, self._num_active - num_kept, self._num_active)

    def _masked_tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(parameter name, what holds its values or its optimiser state, the mask of that)."""
        for name, weight in self._partly_active.items():
            mask = self.masks[name]
            states = self.optimizer.state.get(weight, {}).values()
            shadows = [shadow[plain_name(name)] for shadow in self._shadows]
            for tensor in (weight, *(s for s in states if isinstance(s, Tensor) and s.shape == weight.shape), *shadows):
                yield name, tensor.detach(), mask
            for fragment, start in self._fragments(weight):
                yield name, fragment, mask.reshape(-1)[start : start + fragment.numel()]

    def _zero_inactive(self) -> None:
        multiply_by_masks((tensor, mask) for _, tensor, mask in self._masked_tensors())

    def _dirty_weights(self) -> list[str]:
        """Names of those that are not 0 where their mask is; one host read for all."""
        is_dirty = are_nonzero_outside(
            (weight.detach(), self.masks[name]) for name, weight in self._partly_active.items()
        )
        return [name for name, dirty in zip(self._partly_active, is_dirty, strict=True) if dirty]

    def _grow_scores(self, criterion: str) -> dict[str, Tensor]:
        scores = {}
        for layer, (name, weight) in enumerate(self.weights.items()):
            key = key_of(self.seed, self.update_index + 1, layer)
            inputs = GrowthInputs(weight.grad, self.average.get(name), self.ever_active[name], key)
            found = GROW[criterion].scores(inputs)
            # Scores are used up, and the gradient is masked before they are: a view of an input will not do.
            is_view = any(
                t is not None and t.untyped_storage().data_ptr() == found.untyped_storage().data_ptr()
                for t in inputs.tensors
            )
            scores[name] = found.clone() if is_view else found
        return scores

    def _is_finite(self) -> bool:
        """Are all gradients, of weights that are not sparse too, and the sparse weights finite on all ranks?

        Raises:
            NumericsError: when they are not, unless ``skip_nonfinite`` is set.
        """
        tensors = {f"gradient of {name}": p.grad for name, p in self._parameters.items() if p.grad is not None}
        tensors |= {name: weight.detach() for name, weight in self.weights.items()}
        is_good = torch.isfinite(torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))]))
        if session.agree(is_finite=is_good.all())[0]:
            return True
        is_good = torch.stack(
            [torch.isfinite(tensor).all() for tensor in tensors.values()]
        )  # a norm overflows sooner than its values
        if session.agree(is_finite=is_good.all())[0]:
            return True
        if not self.skip_nonfinite:
            bad = [name for name, good in zip(tensors, is_good.tolist(), strict=True) if not good]
            raise NumericsError(
                f"{', '.join(bad[:3]) or 'a layer of another rank'} is not finite at step {self.steps}; no mask was changed",
                do="lower the learning rate, or resume from the last checkpoint with --resume auto",
                is_told_elsewhere=not session.is_main(),
            )
        return False

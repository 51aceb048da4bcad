"""Apply a sparse training method to a model and its optimiser.

Call ``before_step`` and ``after_step`` around ``optimizer.step()`` of any training loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.errors import ConfigError, IntegrityError, NumericsError
from pipeline.numbers import quantity
from pipeline.sparse.adam import OwnStepCounts
from pipeline.sparse.at_once import fingerprint, num_nonzero_outside
from pipeline.sparse.checks import check_strategy
from pipeline.sparse.criteria import GrowthInputs, growth_stages, reads
from pipeline.sparse.dense import DensePart
from pipeline.sparse.distribution import check_masks, initial_masks
from pipeline.sparse.exploration import density, explore, num_ablated, num_weights, r_s
from pipeline.sparse.flops import FlopMeter
from pipeline.sparse.masks import layer_digests, mask_digest, pack_masks
from pipeline.sparse.optimizers import keeps_zeros
from pipeline.sparse.request import Request, ScoredUpdate, TopologyUpdate, request_of
from pipeline.sparse.select import both, count_true, is_on_host, key_of
from pipeline.sparse.slips import StepWatch, warn_of_unlisted_average
from pipeline.sparse.state import Progress, state_mismatch
from pipeline.sparse.strategy import Strategy, find_strategy
from pipeline.sparse.timing import DueUpdate
from pipeline.sparse.update import updated_masks
from pipeline.sparse.values import Fragments, WeightValues

logger = logging.getLogger(__name__)

AVERAGE_DECAY = 0.9  # of SNFS's moving average


class Sparsifier:
    """Owns the masks of a model: keeps its inactive weights at exactly 0, and updates the masks when asked to.

    Call ``before_step`` and ``after_step`` around the optimiser step, with gradients that are
    averaged over micro-batches, unscaled and not yet clipped. A plain loop::

        updates = timetable("rigl", num_steps)
        sparsifier = Sparsifier(model, optimizer, "rigl", density=0.1, seed=0)
        for step, (images, labels) in enumerate(loader):
            loss_function(model(images), labels).backward()
            if sparsifier.before_step(updates.at(step)):  # scores growth, then masks the gradient
                optimizer.step()
            sparsifier.after_step()  # prunes and regrows when an update is due
            optimizer.zero_grad()

    With a GradScaler, which skips steps whose gradients are not finite (``skip_nonfinite=True``)::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if sparsifier.before_step(updates.at(step)):  # False: a due update is postponed to the next step
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
        sparsifier.after_step()
        scaler.update()

    With DistributedDataParallel, run the same loop on every rank. DDP makes the weights of all ranks
    equal when it wraps the model, and averages the gradients. All ranks then compute the same masks,
    and compare them::

        ddp = DistributedDataParallel(model)
        sparsifier = Sparsifier(model, optimizer, "rigl", density=0.1, seed=0)

    Common mistakes are reported: an optimiser step without ``after_step``, at the next
    ``before_step``; gradients that a GradScaler unscales only after ``before_step``, at the first
    optimiser step (with a fused optimiser, at any step); and, as a warning at the first update, a
    ``torch.optim.swa_utils.AveragedModel`` of this model that is not in ``shadows``. An average of
    another class can be checked with :meth:`check_shadow`; it cannot be saved as a ticket unless it
    is 0 outside the masks.

    Args:
        model: model whose weights are equal on all ranks; its sparse weights are masked at once,
            except those that require no gradient.
        optimizer: any but LBFGS. Its state of a weight's shape is masked with the weight. If it is not
            known to leave a weight alone whose gradient is 0 (Muon, Shampoo, Lookahead), weights and
            state are masked after each of its steps (``pipeline.sparse.optimizers``).
        method: a name in ``METHODS``, or a Strategy.
        density: share of the weights of all sparse layers that are active at the start, in (0, 1].
            Where the density moves (``granet``, ``gmp``, ``acdc``), pass ``METHODS["granet"].initial_density``.
        seed: seed of the initial masks and of random growth.
        dense_layers: names or patterns of weights that stay dense.
        macs: multiply-accumulate operations of each layer for one image (``flops.layer_macs``); None
            counts no FLOPs.
        fragments: returns, for a parameter, the flat tensors outside the model and
            ``optimizer.state`` that hold a part of it or of its optimiser state, each with the index
            in the flattened parameter at which it starts (DeepSpeed's ZeRO stage 1).
        on_masks: called with the masks, now and after every update (``Engine.use_masks``).
        shadows: models that follow this one, such as moving averages of the weights, with the same
            parameter names, or with ``module.`` before them; they are masked after every update.
        check_every: number of steps between two checks of masks and weights, beside the one after the
            first step; 0 for no further checks.
        skip_nonfinite: what to do if a gradient is not finite on an update step. False: raise
            NumericsError. True: ``before_step`` returns False, and the update is postponed to the
            next step (a GradScaler skips the optimiser step).
        masks: where the active weights are at first. ``random``, as most methods have it; ``magnitude``,
            the largest weights of each layer; or a mask for each sparse weight, by name (bool),
            such as those of a ticket, whose density is then that of the model, or those of
            :func:`pipeline.sparse.masks_at_start`, which the methods with an ``initial`` need.
        own_step_counts: correct the bias of each weight's moments by the number of steps since it
            grew (``sparse.adam``); only with Adam and AdamW.
        own_step_warmup: with ``own_step_counts``, number of steps over which the learning rate of a weight
            rises after it grew; 0: none.

    Raises:
        ConfigError: the method, the density, the model or the optimiser is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str | Strategy,
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
        own_step_warmup: int = 0,
        masks: Mapping[str, Tensor] | Literal["random", "magnitude"] = "random",
    ) -> None:
        self.strategy = find_strategy(method)
        check_strategy(self.strategy, density)
        self._values = WeightValues(model, optimizer, dense_layers=dense_layers, fragments=fragments, shadows=shadows)
        self.weights = self._values.weights
        self.optimizer = optimizer
        self.seed = seed
        self.check_every = check_every
        self.skip_nonfinite = skip_nonfinite
        self._reads = reads(self.strategy)
        self._on_masks = on_masks
        self._scored: ScoredUpdate | None = None
        self._is_skipped = False
        follow = None if keeps_zeros(optimizer) else self._values.follow_step
        self._watch = StepWatch(optimizer, self.weights, follow)
        self._is_checked = False  # that the optimiser's steps leave pruned weights at 0
        if masks == "random" and self.strategy.initial != "random":
            raise ConfigError(
                f"initial: {self.strategy.initial!r} chooses the masks by the network and a batch",
                do="pass masks=masks_at_start(model, method, batches, density=…)",
            )
        if isinstance(masks, str):
            by_magnitude = masks == "magnitude"
            masks = initial_masks(
                self.weights, self._values.forms, self.strategy, density, seed=seed, by_magnitude=by_magnitude
            )
        else:
            check_masks(masks, {n: tuple(w.shape) for n, w in self.weights.items()}, self.strategy.structure)
        self._use(masks)
        self.ever_active = dict(self.masks)
        self._progress = Progress(history_digest=self._digest)
        self.flops = FlopMeter.of(macs, self.masks) if macs is not None else None
        averaged = self.weights.items() if "average" in self._reads else ()
        self.average = {name: torch.zeros_like(weight).detach() for name, weight in averaged}
        self._own_steps = OwnStepCounts(optimizer, self.weights, warmup=own_step_warmup) if own_step_counts else None
        self._values.zero_inactive()
        session.require_equal("initial masks", self._layer_digests, step=0)
        if session.is_main():
            level = logging.WARNING if self.dense.is_most(self._num_active) else logging.INFO
            total = num_weights(self.masks)
            logger.log(
                level,
                "%s of %s weights active in %s; %s",
                *(f"{self._num_active:,}", f"{total:,}", quantity(len(self.masks), "layer")),
                self.dense.summary(self._num_active, total),
            )

    # -- around the optimiser step

    def needs_dense_gradient(self, update: DueUpdate | float | None = None) -> bool:
        """Return whether ``before_step`` with the same update reads the gradient outside the masks.

        If it does not, the gradient there need not be averaged over ranks, and may have any values.
        """
        request = self._requested(update)
        return "average" in self._reads or ("gradient" in self._reads and request is not None and request.needs_scores)

    def before_step(
        self, update: DueUpdate | float | None = None, *, is_finite: bool = False, is_masked: bool = False
    ) -> bool:
        """Score growth if an update is due, then set the gradients of inactive weights to 0.

        Args:
            update: the topology update to make after this step, as ``UpdateSchedule.at`` returns it,
                or the share of the active weights to replace, in [0, 1]; None: no update.
            is_finite: whether the ranks have already agreed that loss and gradients are finite; they
                are then not checked again.
            is_masked: whether the gradients are already 0 outside the masks, because only active
                values were sent, or the optimiser masks them in its step (``Engine.masks_gradients``).

        Returns:
            True if the optimiser must step. False if it must not, because the update takes the place
            of the step (``Strategy.replaces_step``), or because a weight or gradient is not finite
            and ``skip_nonfinite`` is set.

        Raises:
            NumericsError: a weight or gradient is not finite on an update step (raised on all ranks;
                no mask has changed).
            ConfigError: the update is out of range, or ``after_step`` was not called after the last
                optimiser step.
        """
        self._watch.require_closed(self.steps + 1)
        self._scored, self._is_skipped = None, False
        request = self._requested(update)
        if not is_finite and (request is not None or self.average):
            self._is_skipped = not self._is_finite()
        self._progress.postponed = request if self._is_skipped else None
        if self._is_skipped:
            return False
        for name, average in self.average.items():
            if (gradient := self.weights[name].grad) is not None:
                average.lerp_(gradient, 1 - AVERAGE_DECAY)
        if request is not None:
            self._scored = self._score(request)
        if not is_masked:
            self._values.zero_inactive_gradients()
        if self._own_steps is not None:
            self._own_steps.before_step()
        self._watch.open()
        return not (self.strategy.replaces_step and self._scored is not None)

    @torch.no_grad()
    def after_step(self) -> TopologyUpdate | None:
        """Prune and regrow if an update is due; return what was done, or None on an ordinary step.

        A weight that the same update prunes and regrows keeps its value and its optimiser state, or
        starts at 0, as ``Strategy.regrown`` says; any other weight that grows starts at 0.

        Raises:
            IntegrityError: the masks differ between ranks or have changed without an update, or an
                inactive weight is not 0.
        """
        if self._is_skipped:
            self._watch.close()
            return None
        self._watch.require_followed()
        self._watch.close()
        self._progress.steps += 1
        if self.flops is not None:
            is_read = self._scored is not None and bool(self._scored.growth) and "gradient" in self._reads
            self.flops.step(needs_dense_gradient=is_read or "average" in self._reads)
        if self._own_steps is not None and not (self.strategy.replaces_step and self._scored is not None):
            self._own_steps.after_step(self.masks)
        is_due = bool(self.check_every) and self.steps % self.check_every == 0 and self._scored is None
        if not self._is_checked:
            self._is_checked = True
            suspects = f"{type(self.optimizer).__name__} or what stands between step and after_step"
            self._check(do=f"find out what changed it, {suspects}")
        elif is_due:
            self.check()
        if self._scored is not None:
            scored, self._scored = self._scored, None
            return self._update(scored)
        return None

    @torch.no_grad()
    def check(self) -> None:
        """Check that the masks are equal on all ranks and unchanged since the last update, and inactive weights are 0.

        All ranks must call this together.

        Raises:
            IntegrityError: a check fails; the message names the first layer and the ranks that differ.
        """
        self._check(do="do not continue from this state: restart from the last checkpoint, find out what changed it")

    def _check(self, *, do: str) -> None:
        if self._is_intact():
            return
        digests = layer_digests(pack_masks(self.masks))
        session.require_equal("masks", digests, step=self.steps)
        problem = ""
        if changed := [name for name in digests if digests[name] != self._layer_digests[name]]:
            problem = f"the mask of {changed[0]} has changed since update {self.update_index}, without an update"
        elif (dirty := self._values.find_nonzero_inactive()) is not None:
            problem = f"{dirty} has non-zero values where its mask is 0"
        elif self._fingerprint is not None:
            problem = "masks or weights were found damaged on the device, and whole when they were looked at again"
        error = IntegrityError(f"{problem} (check after step {self.steps})", do=do)
        session.raise_together(error if problem else None)

    def _is_intact(self) -> bool:
        """Make the check on the devices of all ranks; one host read. On a CPU return False: look at every layer."""
        if self._fingerprint is None:
            return False
        masks = list(self.masks.values())
        seen = fingerprint(masks)
        num_nonzero = num_nonzero_outside(list(self.weights.values()), masks)
        rows = session.gather_numbers(torch.stack([seen, seen != self._fingerprint, num_nonzero]))
        return all(row == [rows[0][0], 0, 0] for row in rows)

    @torch.no_grad()
    def check_shadow(self, shadow: nn.Module) -> None:
        """Check that a copy of the model is 0 outside the masks, before it is evaluated or exported.

        Args:
            shadow: model with the same parameter names, or with ``module.`` before them.

        Raises:
            ConfigError: a parameter is missing, or is on another device.
            IntegrityError: a weight is not 0; the message names the first one.
        """
        if (dirty := self._values.find_nonzero_in_shadow(shadow)) is not None:
            raise IntegrityError(
                f"{dirty} of this copy has non-zero values where its mask is 0",
                do="pass the copy to the Sparsifier in shadows, from the first step on",
            )

    # -- properties

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by weight name: bool, in the weight's shape and memory format; True marks an active weight."""
        return self._values.masks

    @property
    def steps(self) -> int:
        """Number of optimiser steps so far."""
        return self._progress.steps

    @property
    def update_index(self) -> int:
        """Number of topology updates so far."""
        return self._progress.update_index

    @property
    def history_digest(self) -> str:
        """A hash that is chained over all updates: runs with the same value had the same masks after every update."""
        return self._progress.history_digest

    @property
    def density(self) -> float:
        """Share of the weights of all sparse layers that are active, in (0, 1]."""
        return density(self.masks)

    @property
    def dense(self) -> DensePart:
        """The parameters without a mask: which weights stay dense, and why."""
        return self._values.dense

    @property
    def network_density(self) -> float:
        """Active weights and dense parameters, over all parameters of the network."""
        return self.dense.network_density(self._num_active, num_weights(self.masks))

    @property
    def r_s(self) -> float:
        """R_s, the in-time over-parameterisation rate so far, in (0, 1] (ITOP, arXiv 2102.02887)."""
        return r_s(self.ever_active)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return everything to save beside the model and the optimiser, for :meth:`load_state_dict`."""
        return {
            "masks": self.masks,
            "ever_active": self.ever_active,
            "numbers": self.numbers(),
            "tensors": self.tensors(),
        }

    def numbers(self) -> dict[str, int | float | str]:
        """Return the counters, digests and other single values of the state, by name."""
        numbers = self._progress.numbers() | {"mask_digest": self._digest, "seed": self.seed}
        return numbers | ({"flops_spent": self.flops.spent} if self.flops is not None else {})

    def tensors(self) -> dict[str, Tensor]:
        """Return the dense tensors of the state, in the weights' shapes: moving averages, and steps of growth."""
        grown_at = self._own_steps.grown_at if self._own_steps is not None else {}
        return {f"average/{name}": t for name, t in self.average.items()} | {
            f"grown_at/{name}": t for name, t in grown_at.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from a state that :meth:`state_dict` returned; restore the model and the optimiser first.

        All ranks must call this together.

        Raises:
            IntegrityError: the state is from another model, method or seed, its masks are damaged, or
                a weight is not 0 outside them (raised on all ranks, even if only one is affected).
        """
        own = self.state_dict()
        problem = state_mismatch(state, own)
        if not problem:
            numbers = state["numbers"]
            self._use(state["masks"])
            self.ever_active = {n: state["ever_active"][n].to(weight.device) for n, weight in self.weights.items()}
            self._progress = Progress.of(numbers)
            self._scored, self._is_skipped = None, False
            self._watch.close()
            if self.flops is not None:
                self.flops.spent = float(numbers["flops_spent"])
                self.flops.use(self.masks)
            for name, tensor in own["tensors"].items():
                tensor.copy_(state["tensors"][name])
            if self._digest != numbers["mask_digest"]:
                problem = "its masks are not those that were saved"
            elif (dirty := self._values.find_nonzero_inactive()) is not None:
                problem = f"{dirty} has non-zero values where its mask is 0"
        error = IntegrityError(
            f"checkpoint: {problem}", do="resume from an older checkpoint, with the model, method and seed of this one"
        )
        session.raise_together(error if problem else None)
        # optimiser state too, which may not be 0 at rest (Rprop's step sizes)
        self._values.zero_inactive()
        seen = {**self._layer_digests, "their history": self._progress.fingerprint()}
        session.require_equal("restored masks", seen, step=self.steps)

    # -- internals

    def _requested(self, update: DueUpdate | float | None) -> Request | None:
        """Return the update to make, which may be a postponed one; None if nothing would change."""
        if update is None:
            return self._progress.postponed
        due = update if isinstance(update, DueUpdate) else DueUpdate(update)
        return request_of(self.strategy, due, num_active=self._num_active, num_weights=num_weights(self.masks))

    def _use(self, masks: Mapping[str, Tensor]) -> None:
        self._num_active = self._values.use(masks)
        packed = pack_masks({name: masks[name] for name in self.masks})
        self._layer_digests = layer_digests(packed)
        self._digest = mask_digest(self.masks, packed)
        used = list(self.masks.values())
        self._fingerprint = None if is_on_host(used[0]) else fingerprint(used)
        if self._on_masks is not None:
            self._on_masks(self.masks)

    def _update(self, scored: ScoredUpdate) -> TopologyUpdate:
        old, request = self.masks, scored.request
        updated = updated_masks(
            old,
            self.weights,
            request,
            scored.growth,
            strategy=self.strategy,
            num_active_before=self._num_active,
            without_gradient=scored.without_gradient,
            norm_shapes=self._values.norm_shapes,
            output_layer=self._values.output_layer,
        )
        self._use(updated.masks)
        self._progress.note_update(self._digest)
        self.ever_active = explore(self.ever_active, self.masks)
        self._values.zero_inactive()
        self._values.zero_where(updated.restarted)
        session.require_equal("masks", self._layer_digests, step=self.steps)
        if self.flops is not None:
            self.flops.use(self.masks)
        if self._own_steps is not None:
            stayed = {name: mask & ~updated.restarted[name] for name, mask in old.items()} if updated.restarted else old
            self._own_steps.note_growth(stayed, self.masks)
        if self.update_index == 1:
            warn_of_unlisted_average(self.weights, self._values.shadows)
        num_kept = sum(count_true(both(list(self.masks.values()), list(old.values()))))
        return TopologyUpdate(
            self.update_index,
            request.drop_fraction,
            num_new=self._num_active - num_kept,
            num_active=self._num_active,
            num_ablated=num_ablated(self.masks) if self.strategy.min_salient else 0,
        )

    def _score(self, request: Request) -> ScoredUpdate:
        inputs = {
            name: GrowthInputs(
                weight.grad,
                self.average.get(name),
                self.ever_active[name],
                key_of(self.seed, self.update_index + 1, layer),
            )
            for layer, (name, weight) in enumerate(self.weights.items())
        }
        blind = [name for name, weight in self.weights.items() if weight.grad is None]
        return ScoredUpdate(
            request,
            growth_stages(self.strategy, inputs) if request.needs_scores else [],
            without_gradient=frozenset(blind if "gradient" in self._reads else ()),
        )

    def _is_finite(self) -> bool:
        """Return whether all gradients and all sparse weights are finite on all ranks.

        Raises:
            NumericsError: they are not, and ``skip_nonfinite`` is not set.
        """
        bad = self._values.find_nonfinite()
        if bad is not None and not self.skip_nonfinite:
            raise NumericsError(
                f"{', '.join(bad[:3]) or 'a layer of another rank'} is not finite at step {self.steps}; "
                "no mask was changed",
                do="lower the learning rate, or resume from the last checkpoint with --resume auto",
                is_reported_elsewhere=not session.is_main(),
            )
        return bad is None

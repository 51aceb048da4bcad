"""Which state of a phase becomes its ticket: the last, the best on held-out images, or both (``tickets.select``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import parts
from pipeline.config.load import config_digest
from pipeline.config.schema import KEYS, Config
from pipeline.data.loaders import EvalLoader
from pipeline.datasets.sidecar import BetonInfo
from pipeline.distributed.session import is_main, on_main
from pipeline.engine.protocol import Engine
from pipeline.engine.torch_engine import autocast_dtype
from pipeline.evaluation.batchnorm import average_buffers
from pipeline.evaluation.predict import Networks
from pipeline.evaluation.score import score
from pipeline.plan import Phase, Plan
from pipeline.sparse.exploration import num_weights
from pipeline.sparse.flops import dense_flops, sparse_flops
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.tickets.best import HELD_OUT_TOP1, BestTicket
from pipeline.tickets.format import PREPROCESSING, Provenance, Ticket, decode, encode, ticket_of
from pipeline.tickets.network import Network
from pipeline.tickets.store import TicketStore
from pipeline.training.evaluation import kept_random_state, steps_between
from pipeline.training.step_log import StepLog

logger = logging.getLogger(__name__)

BEST = "best"  # folder and label of the best tickets beside the last ones

MakeTicket = Callable[[Phase, int, Mapping[str, float]], Ticket]  # phase, steps done, entries of its ``extra``


def preprocessing_of(config: Config) -> dict[str, Any]:
    """Return how images are prepared, for a ticket; keys at their neutral value are left out."""
    prepared = {key: getattr(config.data, key) for key in PREPROCESSING}
    return {key: value for key, value in prepared.items() if KEYS[f"data.{key}"].neutral != value}


class Selection:
    """Saves the tickets of each phase, and keeps the best state of the current one.

    The best state is the first with the highest top-1 accuracy on held-out images, which are
    evaluated every ``evaluation.every`` and after the last step of the phase. A request to stop
    does not shorten this, so that a run that is stopped and resumed chooses the same state.

    Args:
        config: the configuration.
        plan: the plan of the run.
        stores: where the tickets go: of the last states, or of the best ones, or of both in this order.
        make_ticket: makes a ticket of the present state; every rank calls it.
        loader: this rank's share of the held-out images; None if only last states are saved.
        network: a network to evaluate, and a function that returns the state to load into it.
        num_active: returns the present number of active weights.
        held_out_digest: identity of the held-out images.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        stores: Sequence[TicketStore],
        make_ticket: MakeTicket,
        *,
        loader: EvalLoader | None,
        network: tuple[nn.Module, Callable[[], Mapping[str, Tensor]]] | None,
        num_active: Callable[[], int],
        held_out_digest: str,
    ) -> None:
        self.select = config.tickets.select
        self.plan = plan
        self.stores = tuple(stores)
        self.best = BestTicket(held_out_digest)
        self._every = steps_between(config, plan)
        self._make_ticket = make_ticket
        self._loader = loader
        self._network = network
        self._num_active = num_active
        self._num_classes = config.model.num_classes
        self._autocast_dtype = autocast_dtype(config.train)

    def is_due(self, step: int) -> bool:
        """Return whether the state after run step ``step`` is to be considered; the same on all ranks."""
        phase = self.plan.at(step)
        if self._network is None or phase.ticket_index is None:
            return False
        return (step + 1) % self._every == 0 or step + 1 == phase.stop

    def consider(self, step: int, log: StepLog) -> None:
        """Evaluate the state after run step ``step`` on the held-out images, and keep it if it is the best so far."""
        assert self._network is not None and self._loader is not None
        network, state = self._network
        started = time.perf_counter()
        with log.aside, kept_random_state():
            network.load_state_dict(state())
            networks = Networks([network], autocast_dtype=self._autocast_dtype)
            (found,) = score(networks, self._loader, num_classes=self._num_classes)
            num_active = self._num_active()
            is_best = self.best.is_beaten_by(found.top1, num_active)
            if is_best:
                ticket = self._make_ticket(self.plan.at(step), step + 1, {HELD_OUT_TOP1: found.top1})
                self.best.keep(found.top1, num_active, encode(ticket) if is_main() else b"")
        if is_main():
            seconds = time.perf_counter() - started
            log.metrics({"val/held_out_top1": found.top1, "time/held_out_seconds": seconds}, step=step)
            logger.info(
                "step %d: top-1 %.2f%% on held-out images%s (%.1f s)",
                *(step + 1, 100 * found.top1, ", the best of the phase" if is_best else "", seconds),
            )

    def save(self, phase: Phase) -> dict[str, str]:
        """Save the tickets of ``phase``, whose last step has been taken; every rank must call this.

        Returns:
            The digest of each ticket before it is named after its run: ``last``, ``best`` or both.

        Raises:
            WriteError, PermissionDenied: on every rank, when a ticket could not be saved.
        """
        digests = {}
        if self.select != "best":
            last = self._make_ticket(phase, phase.stop, {})
            digests["last"] = on_main(lambda: _save(last, self.stores[0]))
        if self.select != "last":
            digests[BEST] = on_main(lambda: _save(decode(self.best.content), self.stores[-1]))
            self.best.clear()
        return digests


def _save(ticket: Ticket, store: TicketStore) -> str:
    """Save a ticket as one of the run that owns ``store``; return its digest without the name of the run."""
    assert store.owner is not None
    made = ticket.provenance
    logger.info(
        "ticket %d after step %d: %s of %s, density %.4f, R_s %.3f",
        *(
            made.index,
            made.step,
            "best state" if HELD_OUT_TOP1 in made.extra else "end",
            made.phase,
            ticket.density,
            made.r_s,
        ),
    )
    store.save(replace(ticket, provenance=replace(ticket.provenance, parent_run=store.owner)))
    return ticket.content_digest


def make_ticket(
    engine: Engine,
    sparsifier: Sparsifier,
    phase: Phase,
    step: int,
    extra: Mapping[str, float],
    *,
    config: Config,
    plan: Plan,
    train_info: BetonInfo,
    origin: Mapping[str, Any],
) -> Ticket:
    """Make a ticket of the present state, with BatchNorm statistics averaged over ranks.

    It does not name the run yet, so that checkpoints of equal runs, which may hold it, are equal.
    Every rank must call this.

    Args:
        engine: holds the network, or its moving average with ``tickets.weights: average``.
        sparsifier: holds the masks.
        phase: the phase whose ticket it is.
        step: number of steps done.
        extra: further numbers for the provenance.
        config: the configuration.
        plan: the plan of the run.
        train_info: the training set.
        origin: where initial weights come from, for the provenance; empty: from the seed.
    """
    assert phase.ticket_index is not None and sparsifier.flops is not None
    network = ticket_network(engine, config)
    if network is not engine.model:
        extra = {**extra, "ema_decay": config.train.ema_decay}
    macs = sparsifier.flops.macs
    provenance = Provenance(
        index=phase.ticket_index,
        model=config.model.name,
        model_args=config.model.args,
        num_classes=config.model.num_classes,
        method=config.sparsity.method,
        phase=phase.name,
        step=step,
        samples_seen=step * plan.global_batch,
        epochs=step / plan.steps_per_epoch,
        density=config.sparsity.density,
        r_s=sparsifier.r_s,
        seed=config.seed,
        config_digest=config_digest(config),
        data_digest=train_info.digest,
        class_list_digest=str(train_info.sidecar["classes_sha256"]),
        mask_digest=mask_digest(sparsifier.masks),
        parent_run="",
        extra={
            "training_flops_ratio": sparsifier.flops.spent / (3 * dense_flops(macs) * plan.reference_steps),
            "inference_flops_ratio": sparse_flops(macs, sparsifier.masks) / dense_flops(macs),
            "dense_reference_epochs": plan.reference_steps / plan.steps_per_epoch,
            **extra,
        },
        preprocessing=preprocessing_of(config),
        origin={**origin, **({parts.IMPORTS: parts.imported()} if config.imports else {})},
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.tickets.dtype]
    return ticket_of(
        network,
        sparsifier.masks,
        provenance=provenance,
        network=Network(
            classes=tuple(train_info.classes),
            parameters=num_weights(sparsifier.masks) + sparsifier.dense.num_parameters,
            density=sparsifier.network_density,
            dense={weight.name: weight.why for weight in sparsifier.dense.weights},
        ),
        buffers=average_buffers(network),
        dtype=dtype,
    )


def ticket_network(engine: Engine, config: Config) -> nn.Module:
    """Return the network that tickets hold: the one that is trained, or its moving average."""
    if config.tickets.weights == "network":
        return engine.model
    assert engine.average is not None, "the configuration was not checked"
    return engine.average.module


def describe_tickets(config: Config) -> str:
    """Say in words which states and weights the tickets hold."""
    states = {
        "last": "the last state of each phase",
        "best": "the best state of each phase on held-out images",
        "both": f"the last state of each phase; {BEST}-…: the best on held-out images",
    }[config.tickets.select]
    average = f", moving average of the weights (decay {config.train.ema_decay:g})"
    return states + (average if config.tickets.weights == "average" else "")

"""What is compared: the networks of tickets, their superpositions, and which of them together make a row of the report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.config.schema import EvaluationConfig
from pipeline.distributed.session import on_main, require_equal
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.batchnorm import recalibrate
from pipeline.evaluation.predict import EvalBatches, Networks, predict
from pipeline.evaluation.runs import TicketRun
from pipeline.sparse.masks import mask_digest
from pipeline.superposition.rules import RULES, ordered
from pipeline.superposition.superpose import superpose
from pipeline.tickets.compare import Overlap, PackedMasks, mask_overlap
from pipeline.tickets.format import Provenance, Ticket, decode, read_packed, ticket_of, unpack
from pipeline.tickets.store import TicketRef

logger = logging.getLogger(__name__)

EXPLORATION = "exploration"  # name of the phase, as in pipeline.plan
BuildModel = Callable[
    [Ticket], nn.Module
]  # a fresh network for it, on the device, and in the memory format, in which it is to run
FlopsRatio = Callable[
    [Provenance, Mapping[str, Tensor]], float
]  # FLOPs of a forward pass with these masks, against dense


class MicroBatches(Protocol):
    """What recalibration needs of the training loader."""

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Setup:
    """How tickets become networks and are superposed, the same for every row of a report.

    `networks.evaluation_setup` makes one from a configuration.
    """

    settings: EvaluationConfig  # ``evaluation`` of the configuration
    build_model: BuildModel
    flops_ratio: FlopsRatio  # for a superposed network; a ticket's own figure is in its provenance
    train_loader: MicroBatches | None = None  # recalibrates BatchNorm of superposed networks; None: there are none
    held_out: EvalBatches | None = None  # what a superposition rule chooses with: other images than those evaluated
    autocast_dtype: torch.dtype | None = None  # None: fp32


@dataclass(frozen=True)
class Facts:
    """What a report says of a network besides its predictions."""

    run: str  # label
    provenance: Provenance
    density: float
    num_parameters: int
    inference_flops_ratio: float


@dataclass(frozen=True)
class Line:
    """A row to be: one network, or several whose probabilities are averaged."""

    name: str  # ticket-0, run1-ticket-0, superposition-mean, ensemble-3
    kind: str  # ticket, dense, superposition, ensemble
    members: tuple[int, ...]  # positions of networks
    num_members: int  # tickets that it is made of


@dataclass
class Members:
    """Networks side by side, and the rows that they make."""

    models: list[nn.Module] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    masks: dict[str, PackedMasks] = field(default_factory=dict)  # of the rows that are tickets
    superpositions: dict[str, Ticket] = field(default_factory=dict)  # of the rows that are superpositions

    @property
    def tickets(self) -> list[Line]:
        return [line for line in self.lines if line.kind == "ticket"]

    def add(
        self, name: str, kind: str, model: nn.Module, ticket: Ticket, *, run: str, flops: float, num_members: int = 1
    ) -> None:
        self.lines.append(Line(name, kind, (len(self.models),), num_members))
        self.models.append(model)
        self.facts.append(Facts(run, ticket.provenance, ticket.density, ticket.num_parameters, flops))

    def overlaps(self) -> dict[tuple[int, int], Overlap]:
        """Of the masks of every pair (i, j) of tickets, i < j, whose networks are alike."""
        pairs = combinations(enumerate(line.name for line in self.tickets), 2)
        found = {(i, j): mask_overlap(self.masks[one], self.masks[other]) for (i, one), (j, other) in pairs}
        return {pair: overlap for pair, overlap in found.items() if overlap is not None}


def require_same_tickets(runs: Sequence[TicketRun]) -> None:
    """Raises DataError when there is no ticket, IntegrityError when the ranks see different ones."""
    refs = [ref for run in runs for ref in run.refs]
    digest = hashlib.sha256("".join(ref.content_digest for ref in refs).encode()).digest()
    require_equal(
        "ticket lists",
        {"content digests": int.from_bytes(digest[:7], "big")},
        step=refs[-1].provenance.step if refs else 0,
    )
    if not refs:
        raise DataError("no ticket to evaluate")


def open_members(runs: Sequence[TicketRun], setup: Setup) -> Members:
    """Every ticket as a network, the superposition of every run's tickets (with ``train_loader``), and the ensembles.

    Ensembles are of the first 2, 3, … tickets, in the order of runs and of index. Every rank takes
    part.
    """
    require_same_tickets(runs)
    members = Members()
    for run in runs:
        for ref in run.refs:
            packed = read_packed(ref.path)
            ticket = unpack(packed)
            kind, name = "dense" if run.is_dense else "ticket", run.row_of(ref)
            network = network_of(ticket, setup)
            flops = ticket.provenance.extra.get("inference_flops_ratio")
            flops = setup.flops_ratio(ticket.provenance, ticket.masks) if flops is None else flops
            members.add(name, kind, network, ticket, run=run.label, flops=flops)
            members.masks[name] = PackedMasks.of(packed)
    tickets = [i for i, line in enumerate(members.lines) if line.kind == "ticket"]
    for run in runs:
        refs = [ref for ref in run.refs if setup.settings.with_exploration or ref.provenance.phase != EXPLORATION]
        if len(refs) > 1 and not run.is_dense and setup.train_loader is not None:
            model, superposed = superposed_network(refs, setup)
            # an index of its own: those of several runs lie in one folder
            superposed = replace(
                superposed, provenance=replace(superposed.provenance, index=len(members.superpositions))
            )
            extra = superposed.provenance.extra
            name, num_members = run.name(superposed.provenance.method), int(extra["num_members"])
            members.superpositions[name] = superposed
            flops = extra["inference_flops_ratio"]
            members.add(name, "superposition", model, superposed, run=run.label, flops=flops, num_members=num_members)
    for n in range(2, len(tickets) + 1):
        members.lines.append(Line(f"ensemble-{n}", "ensemble", tuple(tickets[:n]), n))
    assert len({line.name for line in members.lines}) == len(members.lines), "a report's rows are told apart by name"
    return members


def superposed_network(refs: Sequence[TicketRef], setup: Setup) -> tuple[nn.Module, Ticket]:
    """The superposition of tickets with recalibrated BatchNorm, as a network and as a ticket.

    It is pruned back to the number of active weights of the last ticket, under ``layer`` scope to
    the number in each layer. Every rank takes part. ``setup`` must have a ``train_loader``.

    Raises:
        ConfigError: there is not a weight for each ticket, or nothing to choose with.
    """
    settings, train_loader, held_out = setup.settings, setup.train_loader, setup.held_out
    assert train_loader is not None, "a superposed network is recalibrated"
    rule, weights = RULES[settings.superposition], settings.ticket_weights or [1.0] * len(refs)
    check_weights(settings, [ref.index for ref in refs])
    if rule.is_judged and held_out is None:
        raise ConfigError(
            f"evaluation.held_out: superposition {settings.superposition!r} has nothing to choose with",
            do="name a file",
        )
    last = decode(refs[-1].path)
    num_active = {name: int(mask.sum()) for name, mask in last.masks.items()}
    network = setup.build_model(last).eval()

    def load(state: dict[str, Tensor]) -> None:
        network.load_state_dict(state)
        images = train_loader.micro_batches(
            batch=settings.recalibration_batch, num_batches=settings.recalibration_batches, seed=last.provenance.seed
        )
        recalibrate(network, images, autocast_dtype=setup.autocast_dtype)

    def score(state: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
        """Top-1 accuracy on the held-out set, the same on all ranks."""
        assert held_out is not None
        load(state)
        networks = Networks(
            [network], autocast_dtype=setup.autocast_dtype, names=[f"a superposition of {last.provenance.parent_run}"]
        )
        predicted = predict(networks, held_out, num_classes=last.provenance.num_classes)
        return float(on_main(lambda: metrics.top1(predicted[0][0], predicted[1]) if predicted else None))

    def score_of(item: tuple[TicketRef, float]) -> float:
        ticket = decode(item[0].path)
        return score(ticket.state, ticket.masks)

    offered = ordered(list(zip(refs, weights, strict=True)), rule, score_of)
    superposition = superpose(
        (decode(ref.path) for ref, _ in offered),
        num_active if settings.prune_scope == "layer" else sum(num_active.values()),
        rule=settings.superposition,
        weights=[weight for _, weight in offered],
        beta=settings.beta,
        coefficients=settings.coefficients,
        prune_every=settings.prune_every,
        score=score if rule.is_judged else None,
    )
    included = ", ".join(
        f"{ref.index} by {share:.3g}" for (ref, _), share in zip(offered, superposition.shares, strict=True) if share
    )
    logger.info("superposition-%s of %s: tickets %s", settings.superposition, last.provenance.parent_run, included)
    load(superposition.state)
    flops = setup.flops_ratio(last.provenance, superposition.masks)
    provenance = replace(
        last.provenance,
        method=f"superposition-{settings.superposition}",
        mask_digest=mask_digest(superposition.masks),
        extra=last.provenance.extra | {"inference_flops_ratio": flops, "num_members": superposition.num_members},
    )
    return network, ticket_of(network, superposition.masks, provenance=provenance, dtype=last.dtype)


def check_weights(settings: EvaluationConfig, indices: Sequence[int]) -> None:
    """Raises ConfigError unless there is a weight for each ticket that is superposed, or none at all."""
    if settings.ticket_weights and len(settings.ticket_weights) != len(indices):
        raise ConfigError(
            f"evaluation.ticket_weights: {len(settings.ticket_weights)} weights, but {len(indices)} tickets are superposed",
            do=f"give one for each of the tickets {', '.join(map(str, indices))}, or none",
        )


def network_of(ticket: Ticket, setup: Setup) -> nn.Module:
    """The ticket's network, in evaluation mode and without gradients.

    Raises DataError when the model that its provenance names has other tensors.
    """
    model = setup.build_model(ticket)
    try:
        model.load_state_dict(ticket.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"ticket {ticket.provenance.index} of {ticket.provenance.parent_run} does not fit {ticket.provenance.model}: {reason}",
            do="use the version of this project, and of the model's library, that it was written with",
        ) from None
    return model.eval().requires_grad_(False)

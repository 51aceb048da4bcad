"""The networks that a report compares: tickets, their superpositions, and the ensembles made of them."""

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
from pipeline.evaluation.sparse import SparseInference
from pipeline.plan import EXPLORATION
from pipeline.sparse.exploration import num_active as num_active_in
from pipeline.sparse.layers import norm_shapes
from pipeline.sparse.masks import mask_digest
from pipeline.superposition.rules import RULES, ordered
from pipeline.superposition.superpose import superpose
from pipeline.terminal.progress import counted
from pipeline.tickets.best import HELD_OUT_TOP1
from pipeline.tickets.compare import Overlap, PackedMasks, mask_overlap
from pipeline.tickets.format import Provenance, Ticket, decode, encode, read_packed, ticket_of, unpack
from pipeline.tickets.store import TicketRef

logger = logging.getLogger(__name__)

# Build a network for the ticket, on the device and in the memory format in which it will run.
BuildModel = Callable[[Ticket], nn.Module]
# Compute the FLOPs of a forward pass with these masks, relative to the dense network.
FlopsRatio = Callable[[Provenance, Mapping[str, Tensor]], float]


class MicroBatches(Protocol):
    """The part of the training loader that recalibration needs."""

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterable[Tensor]:
        """Yield this rank's micro-batches of images, [batch, channels, height, width] each."""
        ...


@dataclass(frozen=True)
class Setup:
    """How tickets become networks and are superposed; the same for every row of a report.

    `networks.evaluation_setup` makes a setup from a configuration.
    """

    settings: EvaluationConfig  # the section ``evaluation`` of the configuration
    build_model: BuildModel
    flops_ratio: FlopsRatio  # for superposed networks; a ticket's own ratio is in its provenance
    train_loader: MicroBatches | None = None  # recalibrates BatchNorm of superposed networks; None: no superposition
    held_out: EvalBatches | None = None  # images a superposition rule chooses with; not those of the evaluation set
    autocast_dtype: torch.dtype | None = None  # None: fp32
    sparse: SparseInference | None = None  # how tickets and superposed networks run; None: by torch, as dense runs do


@dataclass(frozen=True)
class Facts:
    """What a report states about a network besides its predictions."""

    run: str  # label of the run
    provenance: Provenance
    density: float
    num_parameters: int
    inference_flops_ratio: float


@dataclass(frozen=True)
class Line:
    """A line of the report before its metrics are known: one network, or an ensemble that averages several."""

    name: str  # such as ticket-0, run1-ticket-0, superposition-mean, ensemble-3
    kind: str  # ticket, dense, superposition or ensemble
    members: tuple[int, ...]  # positions in ``Members.models``
    num_members: int  # number of tickets that it is made of
    is_apart: bool = False  # see `TicketRun`


@dataclass
class Members:
    """The networks of a report, and its lines."""

    models: list[nn.Module] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    masks: dict[str, PackedMasks] = field(default_factory=dict)  # by name, of the lines that are tickets
    superpositions: dict[str, Ticket] = field(default_factory=dict)  # by name

    @property
    def tickets(self) -> list[Line]:
        """The lines that are single tickets; dense runs and those that are apart are not among them."""
        return [line for line in self.lines if line.kind == "ticket" and not line.is_apart]

    def add(
        self,
        name: str,
        kind: str,
        model: nn.Module,
        ticket: Ticket,
        *,
        run: TicketRun,
        flops: float,
        num_members: int = 1,
    ) -> None:
        """Add a network and its line."""
        self.lines.append(Line(name, kind, (len(self.models),), num_members, run.is_apart))
        self.models.append(model)
        self.facts.append(Facts(run.label, ticket.provenance, ticket.density, ticket.num_parameters, flops))

    def position(self, name: str) -> int:
        """Return the position in ``models`` of the network of a line."""
        return next(line.members[0] for line in self.lines if line.name == name)

    def overlaps(self) -> dict[tuple[int, int], Overlap]:
        """Return the mask overlap of every pair (i, j) of tickets, i < j, that have the same architecture."""
        pairs = combinations(enumerate(line.name for line in self.tickets), 2)
        found = {(i, j): mask_overlap(self.masks[one], self.masks[other]) for (i, one), (j, other) in pairs}
        return {pair: overlap for pair, overlap in found.items() if overlap is not None}


def require_same_tickets(runs: Sequence[TicketRun]) -> None:
    """Check that there are tickets, and that all ranks see the same ones.

    Raises:
        DataError: there is no ticket.
        IntegrityError: ranks see different tickets.
    """
    refs = [ref for run in runs for ref in run.refs]
    digest = hashlib.sha256("".join(ref.content_digest for ref in refs).encode()).digest()
    require_equal(
        "ticket lists",
        {"content digests": int.from_bytes(digest[:7], "big")},
        step=refs[-1].provenance.step if refs else 0,
    )
    if not refs:
        raise DataError("there is no ticket to evaluate")


def open_members(runs: Sequence[TicketRun], setup: Setup) -> Members:
    """Open every ticket as a network, superpose the tickets of every run, and form the ensembles.

    Nothing is superposed without ``setup.train_loader``. The ensembles are of the first 2, 3, …
    tickets, ordered by run and by index; a run that is apart has its own. Every rank must call
    this. Raises the errors of `require_same_tickets`, `network_of` and `superposed_network`.
    """
    require_same_tickets(runs)
    members = Members()
    for run in runs:
        for ref in run.refs:
            packed = read_packed(ref.path)
            ticket = unpack(packed)
            kind, name = "dense" if run.is_dense else "ticket", run.row_of(ref)
            sparse = None if run.is_dense else setup.sparse
            network = network_of(ticket, setup) if sparse is None else sparse.open(ref.path)
            flops = ticket.provenance.extra.get("inference_flops_ratio")
            flops = setup.flops_ratio(ticket.provenance, ticket.masks) if flops is None else flops
            members.add(name, kind, network, ticket, run=run, flops=flops)
            members.masks[name] = PackedMasks.of(packed)
    tickets = [line.members[0] for line in members.tickets]
    for run in runs:
        refs = [ref for ref in run.refs if setup.settings.with_exploration or ref.provenance.phase != EXPLORATION]
        if len(refs) > 1 and not run.is_dense and setup.train_loader is not None:
            model, superposed = superposed_network(refs, setup, label=run.label)
            if setup.sparse is not None:
                model = setup.sparse.open(encode(superposed))
            # a unique index, because the superpositions of several runs are saved in one folder
            superposed = replace(
                superposed, provenance=replace(superposed.provenance, index=len(members.superpositions))
            )
            extra = superposed.provenance.extra
            name, num_members = run.name(superposed.provenance.method), int(extra["num_members"])
            members.superpositions[name] = superposed
            flops = extra["inference_flops_ratio"]
            members.add(name, "superposition", model, superposed, run=run, flops=flops, num_members=num_members)
    for n in range(2, len(tickets) + 1):
        members.lines.append(Line(f"ensemble-{n}", "ensemble", tuple(tickets[:n]), n))
    for run in runs:
        of_run = [members.position(run.row_of(ref)) for ref in run.refs] if run.is_apart and not run.is_dense else []
        for n in range(2, len(of_run) + 1):
            members.lines.append(Line(run.name(f"ensemble-{n}"), "ensemble", tuple(of_run[:n]), n, is_apart=True))
    assert len({line.name for line in members.lines}) == len(members.lines), "two rows of a report have the same name"
    return members


def superposed_network(refs: Sequence[TicketRef], setup: Setup, *, label: str = "") -> tuple[nn.Module, Ticket]:
    """Superpose tickets and recalibrate BatchNorm; returns the result as a network and as a ticket.

    ``label`` names the run of the tickets in the log.

    With ``evaluation.recalibration_batches`` 0 it keeps the BatchNorm statistics of the last included ticket.
    The superposition is pruned to the last ticket's number of active weights: in each layer if
    ``evaluation.prune_scope`` is ``layer``, else overall. Every rank must call this. ``setup`` must
    have a ``train_loader``.

    Raises:
        ConfigError: the number of ticket weights is wrong, or the rule needs a held-out set and
            there is none.
    """
    settings, train_loader, held_out = setup.settings, setup.train_loader, setup.held_out
    assert train_loader is not None, "BatchNorm of a superposed network must be recalibrated"
    rule, weights = RULES[settings.superposition], settings.ticket_weights or [1.0] * len(refs)
    check_weights(settings, [ref.index for ref in refs])
    if rule.is_judged and held_out is None:
        raise ConfigError(
            f"evaluation.held_out: superposition {settings.superposition!r} needs a held-out set",
            do="set it to a data set other than data.val",
        )
    last = decode(refs[-1].path)
    num_active = {name: int(mask.sum()) for name, mask in last.masks.items()}
    network = setup.build_model(last).eval()

    def load(state: dict[str, Tensor]) -> None:
        network.load_state_dict(state)
        if not settings.recalibration_batches:
            return
        images = train_loader.micro_batches(
            batch=settings.recalibration_batch, num_batches=settings.recalibration_batches, seed=last.provenance.seed
        )
        shown = counted(images, "recalibrating BatchNorm", "batches", settings.recalibration_batches)
        recalibrate(network, shown, autocast_dtype=setup.autocast_dtype)

    def score(state: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
        """Return the top-1 accuracy on the held-out set; all ranks get the same number."""
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
        norm_shapes=norm_shapes(network),
    )
    included = [(ref.index, part) for (ref, _), part in zip(offered, superposition.parts, strict=True) if part]
    is_equal = len({round(part, 6) for _, part in included}) == 1
    logger.info(
        "%ssuperposition-%s of ticket%s %s: %s",
        *(f"{label}-" * bool(label), settings.superposition, "s" * (len(included) > 1)),
        ", ".join(f"{index}" if is_equal else f"{index} ({part:.0%})" for index, part in included),
        f"recalibrating BatchNorm on {settings.recalibration_batches} batches of {settings.recalibration_batch} images"
        if settings.recalibration_batches
        else "BatchNorm keeps its statistics",
    )
    load(superposition.state)
    flops = setup.flops_ratio(last.provenance, superposition.masks)
    of_last = {key: value for key, value in last.provenance.extra.items() if key != HELD_OUT_TOP1}
    provenance = replace(
        last.provenance,
        method=f"superposition-{settings.superposition}",
        mask_digest=mask_digest(superposition.masks),
        extra=of_last | {"inference_flops_ratio": flops, "num_members": superposition.num_members},
    )
    num_weights = sum(mask.numel() for mask in superposition.masks.values())
    of = last.network and last.network.with_active(num_active_in(superposition.masks), num_weights)
    return network, ticket_of(network, superposition.masks, provenance=provenance, network=of, dtype=last.dtype)


def check_weights(settings: EvaluationConfig, indices: Sequence[int]) -> None:
    """Check that ``evaluation.ticket_weights`` has one weight for each superposed ticket, or is empty.

    Raises:
        ConfigError: the number of weights is wrong.
    """
    if settings.ticket_weights and len(settings.ticket_weights) != len(indices):
        raise ConfigError(
            f"evaluation.ticket_weights: expected {len(indices)} weights, got {len(settings.ticket_weights)}",
            do=f"give one for each of the superposed tickets {', '.join(map(str, indices))}, or none",
        )


def network_of(ticket: Ticket, setup: Setup) -> nn.Module:
    """Return the ticket's network, in evaluation mode and without gradients.

    Raises:
        DataError: the ticket's tensors are not those of the model that its provenance names.
    """
    model = setup.build_model(ticket)
    try:
        model.load_state_dict(ticket.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"ticket {ticket.provenance.index} of {ticket.provenance.parent_run} "
            f"does not fit {ticket.provenance.model}: {reason}",
            do="use the versions of this project and of the model's library with which it was saved",
        ) from None
    return model.eval().requires_grad_(False)

"""From tickets to the comparison: every ticket, their superposition and the ensembles, as rows, a table, JSON and tracker runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.distributed.session import require_equal
from pipeline.errors import DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.batchnorm import recalibrate
from pipeline.evaluation.predict import EvalBatches, predict
from pipeline.evaluation.superposition import superpose
from pipeline.files import write_atomically
from pipeline.schema import EvaluationConfig
from pipeline.sparse.masks import mask_digest
from pipeline.tickets.format import Provenance, Ticket, decode, ticket_of
from pipeline.tickets.store import TicketRef


@dataclass(frozen=True)
class ReportRow:
    """One network, or one ensemble of them. FLOPs are against a dense network: one forward pass, and a dense training run."""

    name: str  # ticket-0, superposition-mean, ensemble-3
    kind: str  # ticket, superposition, ensemble
    top1: float
    top5: float
    nll: float
    ece: float
    brier: float
    density: float  # of an ensemble: the mean of its members
    r_s: float
    training_flops_ratio: float  # all training up to and including the last member
    inference_flops_ratio: float  # of an ensemble: the sum over its members
    num_parameters: int  # of an ensemble: the sum over its members
    num_members: int


@dataclass(frozen=True)
class Report:
    """The comparison of a run's tickets on one evaluation set."""

    run: dict[str, str | int | float]  # what the tickets have in common: model, method, density asked for, seed
    num_images: int
    dense_reference_epochs: float | None  # length of the dense training that training FLOPs are compared with, if the tickets say
    rows: tuple[ReportRow, ...]
    disagreement: float | None  # fraction of images, mean over pairs of tickets; None for a single ticket
    kl: float | None  # nats, mean over ordered pairs of tickets
    superposition: Ticket | None = None  # the superposed network itself, to be kept as a file


class MicroBatches(Protocol):
    """What recalibration needs of the training loader."""

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterable[Tensor]: ...


class ChildTracker(Protocol):
    """What logging a report needs of a tracker."""

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None: ...


def evaluate_tickets(
    refs: Sequence[TicketRef],
    settings: EvaluationConfig,
    *,
    build_model: Callable[[], nn.Module],
    eval_loader: EvalBatches,
    train_loader: MicroBatches,
    inference_flops_ratio: Callable[[Mapping[str, Tensor]], float],
    autocast_dtype: torch.dtype | None = None,
) -> Report | None:
    """Evaluate tickets, in the order given, with their superposition and the ensembles of the first 2, 3, … of them.

    Every rank takes part, with the same tickets; rank 0 has the report, the others None. All networks are evaluated in one pass
    over the data; what is in memory at a time is one model per ticket, and in superposing a few unpacked tickets.

    Args:
        refs: from `TicketStore.list`, in order of index, which is the order of the superposition.
        settings: ``evaluation`` of the configuration.
        build_model: gives a fresh network on the device, and in the memory format, in which it is to run.
        train_loader: recalibrates BatchNorm of the superposed network. The tickets keep the statistics they have.
        inference_flops_ratio: FLOPs of a forward pass with these masks, against dense. A ticket's own figure is in its provenance.

    Raises DataError when there is no ticket, IntegrityError when a ticket is damaged or ranks see different ones.
    """
    digest = hashlib.sha256("".join(ref.content_digest for ref in refs).encode()).digest()
    require_equal("ticket lists", {"content digests": int.from_bytes(digest[:7], "big")}, step=refs[-1].provenance.step if refs else 0)
    if not refs:
        raise DataError("no ticket to evaluate")
    models, tickets = [], []
    for ref in refs:
        ticket = decode(ref.path)
        models.append(_network(build_model, ticket.state))
        tickets.append(_Facts.of(ticket))
    superposition = None
    if len(refs) > 1:
        network, superposition = superposed_network(
            refs,
            settings,
            build_model=build_model,
            train_loader=train_loader,
            inference_flops_ratio=inference_flops_ratio,
            autocast_dtype=autocast_dtype,
        )
        models.append(network)
    predicted = predict(models, eval_loader, num_classes=ticket.provenance.num_classes, autocast_dtype=autocast_dtype)
    return None if predicted is None else _report(tickets, superposition, *predicted)


def superposed_network(
    refs: Sequence[TicketRef],
    settings: EvaluationConfig,
    *,
    build_model: Callable[[], nn.Module],
    train_loader: MicroBatches,
    inference_flops_ratio: Callable[[Mapping[str, Tensor]], float],
    autocast_dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Ticket]:
    """The superposition of tickets with recalibrated BatchNorm, as a network and as a ticket. Every rank takes part; arguments as above.

    It is pruned back to the number of active weights of the last ticket, under ``layer`` scope to those in each layer.
    """
    last = decode(refs[-1].path)
    num_active = {name: int(mask.sum()) for name, mask in last.masks.items()}
    superposition = superpose(
        (decode(ref.path) for ref in refs),
        num_active if settings.prune_scope == "layer" else sum(num_active.values()),
        rule=settings.superposition,
        beta=settings.beta,
        prune_every=settings.prune_every,
    )
    network = _network(build_model, superposition.state)
    images = train_loader.micro_batches(
        batch=settings.recalibration_batch, num_batches=settings.recalibration_batches, seed=last.provenance.seed
    )
    recalibrate(network, images, autocast_dtype=autocast_dtype)
    provenance = replace(
        last.provenance,
        method=f"superposition-{settings.superposition}",
        mask_digest=mask_digest(superposition.masks),
        extra=last.provenance.extra | {"inference_flops_ratio": inference_flops_ratio(superposition.masks), "num_members": len(refs)},
    )
    return network, ticket_of(network, superposition.masks, provenance=provenance)


def format_table(report: Report) -> str:
    """The rows, aligned, 100 columns wide at most, and below them what was measured on what."""
    heads = ("", "top-1 %", "NLL", "ECE %", "density", "R_s", "train ×", "test ×", "parameters")
    lines = [heads] + [
        (
            row.name,
            f"{100 * row.top1:.2f}",
            f"{row.nll:.4f}",
            f"{100 * row.ece:.2f}",
            f"{row.density:.4f}",
            f"{row.r_s:.3f}",
            f"{row.training_flops_ratio:.3f}",
            f"{row.inference_flops_ratio:.3f}",
            f"{row.num_parameters:,}",
        )
        for row in report.rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    table = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines]
    table.insert(1, "-" * len(table[0]))
    run = ", ".join(f"{key} {value}" for key, value in report.run.items())
    table.append(f"{run}; {report.num_images:,} images.")
    trained = "" if report.dense_reference_epochs is None else f", trained for {report.dense_reference_epochs:g} epochs"
    table.append(f"train ×, test ×: FLOPs against a dense network{trained}.")
    if report.disagreement is not None and report.kl is not None:
        table.append(f"Between tickets: {100 * report.disagreement:.2f}% of predictions differ, KL {report.kl:.4f} nats.")
    return "\n".join(table)


def save_json(report: Report, path: Path) -> None:
    """Everything but the superposed network as JSON. Raises WriteError when it cannot be written."""
    content = asdict(replace(report, superposition=None))
    del content["superposition"]
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def log_report(report: Report, tracker: ChildTracker) -> None:
    """One child run for each row, all with the same metric keys; the parameters of the run are repeated, to find a child by them."""
    for row in report.rows:
        values = asdict(row)
        params = report.run | {key: values.pop(key) for key in ("name", "kind", "num_members")}
        tracker.log_child(row.name, params, {f"eval/{key}": float(value) for key, value in values.items()})


def _network(build_model: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    model = build_model()
    model.load_state_dict(state)
    return model.eval()


@dataclass(frozen=True)
class _Facts:
    """What a report says of a ticket besides its predictions."""

    provenance: Provenance
    density: float
    num_parameters: int

    @classmethod
    def of(cls, ticket: Ticket) -> _Facts:
        return cls(ticket.provenance, ticket.density, ticket.num_parameters)


def _report(tickets: Sequence[_Facts], superposition: Ticket | None, probabilities: Tensor, labels: Tensor) -> Report:
    of_tickets = probabilities[: len(tickets)]
    rows = [
        _row(f"ticket-{facts.provenance.index}", "ticket", of_ticket, labels, [facts])
        for facts, of_ticket in zip(tickets, of_tickets, strict=True)
    ]
    if superposition is not None:
        facts = _Facts.of(superposition)
        row = _row(facts.provenance.method, "superposition", probabilities[-1], labels, [facts])
        rows.append(replace(row, num_members=len(tickets)))
    for n in range(2, len(tickets) + 1):
        rows.append(_row(f"ensemble-{n}", "ensemble", metrics.ensemble(of_tickets[:n]), labels, tickets[:n]))
    last = tickets[-1].provenance
    return Report(
        run={"model": last.model, "method": last.method, "density": last.density, "seed": last.seed},
        num_images=len(labels),
        dense_reference_epochs=last.extra.get("dense_reference_epochs"),
        rows=tuple(rows),
        disagreement=metrics.disagreement(of_tickets) if len(tickets) > 1 else None,
        kl=metrics.pairwise_kl(of_tickets) if len(tickets) > 1 else None,
        superposition=superposition,
    )


def _row(name: str, kind: str, probabilities: Tensor, labels: Tensor, members: Sequence[_Facts]) -> ReportRow:
    last = members[-1].provenance
    return ReportRow(
        name,
        kind,
        top1=metrics.top1(probabilities, labels),
        top5=metrics.top5(probabilities, labels),
        nll=metrics.nll(probabilities, labels),
        ece=metrics.ece(probabilities, labels),
        brier=metrics.brier(probabilities, labels),
        density=sum(facts.density for facts in members) / len(members),
        r_s=last.r_s,
        training_flops_ratio=last.extra["training_flops_ratio"],
        inference_flops_ratio=sum(facts.provenance.extra["inference_flops_ratio"] for facts in members),
        num_parameters=sum(facts.num_parameters for facts in members),
        num_members=len(members),
    )

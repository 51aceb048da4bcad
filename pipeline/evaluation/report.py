"""Evaluate tickets, their superposition and ensembles, and collect the metrics as the rows of a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.evaluation import metrics
from pipeline.evaluation.attacks import ATTACKS, Attack
from pipeline.evaluation.members import Line, Members, Setup, network_of, open_members
from pipeline.evaluation.predict import EvalBatches, Networks, predict
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.sparse import SparseInference
from pipeline.files import write_atomically
from pipeline.numbers import quantity
from pipeline.tickets.format import Ticket, decode
from pipeline.tickets.store import TicketRef
from pipeline.tracking import final

logger = logging.getLogger(__name__)

# the metrics that are computed on every corrupted set
CORRUPTION_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "top1": metrics.top1,
    "nll": metrics.nll,
    "ece": metrics.ece,
}


@dataclass(frozen=True)
class ReportRow:
    """The metrics of one network, or of an ensemble.

    FLOPs are relative to a dense network: to its forward pass, and to its training.
    """

    name: str  # such as ticket-0, superposition-mean, ensemble-3
    kind: str  # ticket, dense, superposition or ensemble
    top1: float
    top5: float
    nll: float
    ece: float
    adaptive_ece: float
    brier: float
    density: float  # of an ensemble: the mean over its members
    r_s: float
    # of all training up to and including the last member; None if a ticket's provenance lacks it
    training_flops_ratio: float | None
    inference_flops_ratio: float  # of an ensemble: the sum over its members
    num_parameters: int  # of an ensemble: the sum over its members
    num_members: int  # number of tickets that it is made of
    is_apart: bool = False  # of other states of the same training, see `TicketRun`
    # metrics of the further sets and attacks: corrupted_top1, fgsm_top1, ood_<set>_auroc_entropy, …; ms_p50 and
    # ms_p99, milliseconds of one image alone
    more: dict[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """All metrics of the row by name, as logged to a tracker."""
        values = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("name", "kind", "num_members", "is_apart", "more")
        }
        return {key: float(value) for key, value in (values | self.more).items() if value is not None}


@dataclass(frozen=True)
class Report:
    """The comparison of tickets, superpositions and ensembles on the evaluation set, and on further sets."""

    run: dict[str, str | int | float]  # model, method, requested density and seed of the tickets
    num_images: int
    # length of the dense training to which training FLOPs are relative; None if the tickets lack it
    dense_reference_epochs: float | None
    rows: tuple[ReportRow, ...]
    disagreement: float | None  # fraction of images, mean over pairs of tickets; None for a single ticket
    kl: float | None  # nats, mean over ordered pairs of tickets
    tickets: tuple[str, ...] = ()  # names of the tickets' rows, in the order of the two matrices that follow
    disagreements: list[list[float]] = field(default_factory=list)  # fraction of images, of every pair of tickets
    # |A ∩ B| / |A ∪ B| of every pair of tickets; None where the architectures differ
    mask_overlaps: list[list[float | None]] = field(default_factory=list)
    # expected overlap of independent masks with the same active weights per layer, mean over pairs
    mask_overlap_by_chance: float | None = None
    # milliseconds of one image through the first ticket's network by torch, with dense arithmetic; {}: not timed
    dense_ms: dict[str, float] = field(default_factory=dict)
    num_attacked: int | None = None  # number of images that FGSM and PGD changed, evenly spaced over the set
    reliability: dict[str, list[metrics.Bin]] = field(default_factory=dict)  # row -> bins of confidence
    # row -> corruption -> severity -> metric -> value
    corrupted: dict[str, dict[str, dict[int, dict[str, float]]]] = field(default_factory=dict)
    superpositions: dict[str, Ticket] = field(default_factory=dict)  # row -> superposed network, to be saved
    predictions: Predictions | None = field(default=None, compare=False)  # of every row, to be saved


@dataclass(frozen=True)
class FurtherSets:
    """What is evaluated besides the predictions on the evaluation set.

    ``corrupted`` and ``other_classes`` are iterated lazily, so that each set is opened when it is
    needed.
    """

    corrupted: Iterable[tuple[str, int, EvalBatches]] = ()  # corruption, severity, set
    other_classes: Iterable[tuple[str, EvalBatches]] = ()  # name, set of images of none of the classes
    attack: Attack | None = None  # the strength of FGSM and PGD; None: no attack
    flip: bool = False  # test-time augmentation, see `predict.Networks`
    fits_temperature: bool = False  # whether to fit a temperature to each row


class ChildTracker(Protocol):
    """The part of a tracker that logging a report needs."""

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Log a child run."""
        ...


def evaluate_tickets(
    runs: Sequence[TicketRun],
    setup: Setup,
    *,
    eval_loader: EvalBatches,
    further: FurtherSets = FurtherSets(),
) -> Report | None:
    """Evaluate tickets, the superposition of each run's tickets, and ensembles of the first 2, 3, … tickets.

    Every rank must call this, with the same tickets. All networks are evaluated in one pass over
    each set. Memory holds a model per ticket, the probabilities on one set and, while tickets are
    superposed, a few of them unpacked.

    Args:
        runs: the tickets, in the order of the ensembles; they keep their BatchNorm statistics.
        setup: how tickets become networks and are superposed.
        eval_loader: the evaluation set.
        further: what else is evaluated.

    Returns:
        The report on rank 0, None on the other ranks.

    Raises:
        DataError: there is no ticket, or a ticket or the set does not fit the network.
        IntegrityError: a ticket is damaged, or ranks see different tickets.
        NumericsError: a network's predictions are not finite.
    """
    members = open_members(runs, setup)
    first = next(ref for run in runs for ref in run.refs)
    return evaluate_members(members, setup, eval_loader=eval_loader, further=further, first=first)


def evaluate_members(
    members: Members,
    setup: Setup,
    *,
    eval_loader: EvalBatches,
    further: FurtherSets = FurtherSets(),
    first: TicketRef | None = None,
) -> Report | None:
    """Evaluate networks that are open already; `evaluate_tickets` says more.

    Every rank must call this. With ``setup.sparse`` every row is timed, and the network of the
    ticket ``first`` by torch; None: nothing is timed. Returns the report on rank 0, None on the
    other ranks. Raises DataError and NumericsError.
    """
    names = [line.name for line in members.lines if line.kind != "ensemble"]
    networks = Networks(members.models, flip=further.flip, autocast_dtype=setup.autocast_dtype, names=names)
    num_classes = members.facts[0].provenance.num_classes
    num_ensembles = len(members.lines) - len(members.models)
    ensembles = f" and {quantity(num_ensembles, 'ensemble')}" if num_ensembles else ""
    on = quantity(eval_loader.num_samples, "image")
    logger.info("evaluating %s%s on %s", quantity(len(members.models), "network"), ensembles, on)
    attacked = [line for line in members.lines if line.kind != "ensemble" or line.num_members == len(members.tickets)]
    predicted = predict(
        networks,
        eval_loader,
        num_classes=num_classes,
        attack=further.attack,
        attacked=[line.members for line in attacked],
    )
    draft = None if predicted is None else _Draft(members, *predicted)
    del predicted
    if draft is not None and further.attack is not None:
        draft.add_attacks(attacked, further.attack)
    if draft is not None and further.fits_temperature:
        draft.add_temperatures()
    for corruption, severity, loader in further.corrupted:
        predicted = predict(networks, loader, num_classes=num_classes)
        if draft is not None and predicted is not None:
            draft.add_corrupted(corruption, severity, *predicted)
    for name, loader in further.other_classes:
        predicted = predict(networks, loader, num_classes=num_classes, are_labels_known=False)
        if draft is not None and predicted is not None:
            draft.add_other_classes(name, predicted[0])
    if draft is not None and setup.sparse is not None and first is not None:
        draft.add_milliseconds(setup, setup.sparse, first)
    return None if draft is None else draft.finish()


class _Draft:
    """An unfinished report, on rank 0.

    ``probabilities`` and ``labels`` are what `predict` returned for the evaluation set.
    """

    def __init__(self, members: Members, probabilities: Tensor, labels: Tensor) -> None:
        self.members = members
        self.labels = labels
        self.of_attacked = probabilities[len(members.models) :]
        self.of_models = probabilities[: len(members.models)]
        self.more: dict[str, dict[str, float]] = {line.name: {} for line in members.lines}
        self.num_attacked: int | None = None
        self.dense_ms: dict[str, float] = {}
        self.corrupted: dict[str, dict[str, dict[int, dict[str, float]]]] = {line.name: {} for line in members.lines}
        self.of_lines = {line.name: self._of(line, self.of_models) for line in members.lines}

    def add_attacks(self, attacked: Sequence[Line], how: Attack) -> None:
        rows = iter(self.of_attacked)
        chosen = how.chosen(torch.arange(len(self.labels)), len(self.labels))
        self.num_attacked = int(chosen.sum())
        for attack in ATTACKS:
            for line in attacked:
                self.more[line.name][f"{attack}_top1"] = metrics.top1(next(rows)[chosen], self.labels[chosen])

    def add_temperatures(self) -> None:
        """Fit a temperature on each half of the images (even and odd ids), and evaluate it on the other half."""
        halves = [torch.arange(len(self.labels)) % 2 == half for half in (0, 1)]
        for name, probabilities in self.of_lines.items():
            scaled = torch.empty_like(probabilities, dtype=torch.float64)
            fitted = []
            for half in halves:
                fitted.append(metrics.best_temperature(probabilities[half], self.labels[half]))
                scaled[~half] = metrics.scaled(probabilities[~half], fitted[-1])
            self.more[name] |= {
                "temperature": sum(fitted) / 2,
                "scaled_nll": metrics.nll(scaled, self.labels),
                "scaled_ece": metrics.ece(scaled, self.labels),
            }

    def add_corrupted(self, corruption: str, severity: int, probabilities: Tensor, labels: Tensor) -> None:
        for line in self.members.lines:
            of_line = self._of(line, probabilities)
            found = {name: metric(of_line, labels) for name, metric in CORRUPTION_METRICS.items()}
            self.corrupted[line.name].setdefault(corruption, {})[severity] = found

    def add_other_classes(self, name: str, probabilities: Tensor) -> None:
        for line in self.members.lines:
            of_line = self._of(line, probabilities)
            for score, function in metrics.SCORES.items():
                known, other = function(self.of_lines[line.name]), function(of_line)
                self.more[line.name][f"ood_{name}_auroc_{score}"] = metrics.ood_auroc(known, other)
                self.more[line.name][f"ood_{name}_fpr95_{score}"] = metrics.ood_fpr95(known, other)

    def add_milliseconds(self, setup: Setup, sparse: SparseInference, first: TicketRef) -> None:
        """Time one image through every row, and through the network of the first ticket by torch, which is dense."""
        logger.info("timing one image at a time on one thread")
        models = [model.cpu() for model in self.members.models]
        for line in self.members.lines:
            found = sparse.latency([models[position] for position in line.members])
            self.more[line.name] |= {"ms_p50": found.p50, "ms_p99": found.p99}
        dense = sparse.latency([network_of(decode(first.path), setup).cpu()])
        self.dense_ms = {"ms_p50": dense.p50, "ms_p99": dense.p99}

    def finish(self) -> Report:
        members, tickets = self.members, [line.members[0] for line in self.members.tickets]
        has_pairs = len(tickets) > 1
        provenance = members.facts[tickets[-1] if tickets else 0].provenance
        of_tickets = self.of_models[tickets]
        corrupted = {name: found for name, found in self.corrupted.items() if found}
        for name, found in corrupted.items():
            for metric in CORRUPTION_METRICS:
                values = {
                    corruption: {s: of[metric] for s, of in severities.items()}
                    for corruption, severities in found.items()
                }
                extra = {
                    corruption: values.pop(corruption)
                    for corruption in metrics.EXTRA_CORRUPTIONS
                    if corruption in values
                }
                for key, part in ((f"corrupted_{metric}", values), (f"extra_corrupted_{metric}", extra)):
                    if part:
                        self.more[name][key] = metrics.corruption_mean(part)
        return Report(
            run=_common(members),
            num_images=len(self.labels),
            dense_reference_epochs=provenance.extra.get("dense_reference_epochs"),
            rows=tuple(self._row(line) for line in members.lines),
            disagreement=metrics.disagreement(of_tickets) if has_pairs else None,
            kl=metrics.pairwise_kl(of_tickets) if has_pairs else None,
            tickets=tuple(line.name for line in members.tickets),
            disagreements=metrics.disagreement_matrix(of_tickets).tolist() if has_pairs else [],
            **_mask_overlaps(members),
            dense_ms=self.dense_ms,
            num_attacked=self.num_attacked,
            reliability={name: metrics.reliability(of_line, self.labels) for name, of_line in self.of_lines.items()},
            corrupted=corrupted,
            superpositions=members.superpositions,
            predictions=self._predictions(),
        )

    def _predictions(self) -> Predictions:
        rows = self.of_lines.values()
        return Predictions(
            tuple(self.of_lines),
            labels=self.labels.numpy(),
            top1=torch.stack([metrics.predicted_classes(of_row) for of_row in rows]).numpy(),
            nll=torch.stack([metrics.nll_of_images(of_row, self.labels).float() for of_row in rows]).numpy(),
            confidence=torch.stack([of_row.amax(dim=1).float() for of_row in rows]).numpy(),
        )

    @staticmethod
    def _of(line: Line, probabilities: Tensor) -> Tensor:
        return (
            probabilities[line.members[0]]
            if len(line.members) == 1
            else metrics.ensemble(probabilities[list(line.members)])
        )

    def _row(self, line: Line) -> ReportRow:
        of_line, facts = self.of_lines[line.name], [self.members.facts[i] for i in line.members]
        # training is counted once per run, up to its last member
        last_of_runs = list({each.run: each for each in facts}.values())
        spent = [each.provenance.extra.get("training_flops_ratio") for each in last_of_runs]
        return ReportRow(
            line.name,
            line.kind,
            top1=metrics.top1(of_line, self.labels),
            top5=metrics.top5(of_line, self.labels),
            nll=metrics.nll(of_line, self.labels),
            ece=metrics.ece(of_line, self.labels),
            adaptive_ece=metrics.adaptive_ece(of_line, self.labels),
            brier=metrics.brier(of_line, self.labels),
            density=sum(each.density for each in facts) / len(facts),
            r_s=sum(each.provenance.r_s for each in last_of_runs) / len(last_of_runs),
            training_flops_ratio=None if None in spent else sum(ratio for ratio in spent if ratio is not None),
            inference_flops_ratio=sum(each.inference_flops_ratio for each in facts),
            num_parameters=sum(each.num_parameters for each in facts),
            num_members=line.num_members,
            is_apart=line.is_apart,
            more=self.more[line.name],
        )


def _mask_overlaps(members: Members) -> dict[str, Any]:
    """Return the fields of the report that describe mask overlaps; empty without a comparable pair of tickets."""
    overlaps, num_tickets = members.overlaps(), len(members.tickets)
    if not overlaps:
        return {}
    matrix: list[list[float | None]] = [
        [1.0 if i == j else None for j in range(num_tickets)] for i in range(num_tickets)
    ]
    for (i, j), overlap in overlaps.items():
        matrix[i][j] = matrix[j][i] = overlap.share
    by_chance = sum(overlap.share_by_chance for overlap in overlaps.values()) / len(overlaps)
    return {"mask_overlaps": matrix, "mask_overlap_by_chance": by_chance}


def _common(members: Members) -> dict[str, str | int | float]:
    """Return model, method, density and seed of the tickets; different values are joined by spaces.

    Dense runs count only if there are no other tickets.
    """
    facts = [members.facts[line.members[0]] for line in members.tickets] or members.facts
    found: dict[str, str | int | float] = {}
    for key in ("model", "method", "density", "seed"):
        values = list(dict.fromkeys(getattr(each.provenance, key) for each in facts))
        found[key] = values[0] if len(values) == 1 else " ".join(map(str, values))
    return found


def final_metrics(report: Report) -> dict[str, float]:
    """Return what the run itself is compared by, see :func:`pipeline.tracking.final.final_metrics`.

    Rows that are apart do not count.
    """
    rows = [row for row in report.rows if not row.is_apart]
    return final.final_metrics([final.Judged(row.kind, row.num_members, row.numbers) for row in rows])


def save_json(report: Report, path: Path) -> None:
    """Write the report, without superposed networks and predictions, as JSON. Raises WriteError if that fails."""
    content: dict[str, Any] = asdict(replace(report, superpositions={}, predictions=None))
    del content["superpositions"], content["predictions"]
    content["reliability"] = {name: [each._asdict() for each in bins] for name, bins in report.reliability.items()}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def log_report(report: Report, tracker: ChildTracker) -> None:
    """Log one child run per row, all with the same metric names.

    Each child repeats the parameters of the run, so that children can be searched by them.
    """
    for row in report.rows:
        params = report.run | {"name": row.name, "kind": row.kind, "num_members": row.num_members}
        tracker.log_child(row.name, params, {f"eval/{key}": value for key, value in row.numbers.items()})

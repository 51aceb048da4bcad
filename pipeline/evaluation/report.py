"""From tickets to the comparison: every ticket, their superposition and the ensembles, as rows, a table, JSON and tracker runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.evaluation import metrics
from pipeline.evaluation.attacks import ATTACKS, Attack
from pipeline.evaluation.members import Line, Members, Setup, open_members
from pipeline.evaluation.predict import EvalBatches, Networks, predict
from pipeline.evaluation.runs import TicketRun
from pipeline.files import write_atomically
from pipeline.tickets.format import Ticket

# Of every corrupted set: what the figures and means are made of.
CORRUPTION_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "top1": metrics.top1,
    "nll": metrics.nll,
    "ece": metrics.ece,
}


@dataclass(frozen=True)
class ReportRow:
    """One network, or one ensemble of them.

    FLOPs are against a dense network: one forward pass, and a dense training run.
    """

    name: str  # ticket-0, superposition-mean, ensemble-3
    kind: str  # ticket, dense, superposition, ensemble
    top1: float
    top5: float
    nll: float
    ece: float
    adaptive_ece: float
    brier: float
    density: float  # of an ensemble: the mean of its members
    r_s: float
    training_flops_ratio: (
        float | None
    )  # all training up to and including the last member; None where a ticket does not say
    inference_flops_ratio: float  # of an ensemble: the sum over its members
    num_parameters: int  # of an ensemble: the sum over its members
    num_members: int
    more: dict[str, float] = field(
        default_factory=dict
    )  # what was asked for: corrupted_top1, fgsm_top1, ood_<set>_auroc_entropy, …

    @property
    def numbers(self) -> dict[str, float]:
        """Every number of the row under one name each, as a tracker gets them."""
        values = {
            key: value for key, value in asdict(self).items() if key not in ("name", "kind", "num_members", "more")
        }
        return {key: float(value) for key, value in (values | self.more).items() if value is not None}


@dataclass(frozen=True)
class Report:
    """The comparison of tickets on one evaluation set, and on what else was asked for."""

    run: dict[str, str | int | float]  # what the tickets have in common: model, method, density asked for, seed
    num_images: int
    dense_reference_epochs: (
        float | None
    )  # length of the dense training that training FLOPs are compared with, if the tickets say
    rows: tuple[ReportRow, ...]
    disagreement: float | None  # fraction of images, mean over pairs of tickets; None for a single ticket
    kl: float | None  # nats, mean over ordered pairs of tickets
    tickets: tuple[str, ...] = ()  # names of the rows that the matrices are about
    disagreements: list[list[float]] = field(default_factory=list)  # of every pair of tickets
    mask_overlaps: list[list[float | None]] = field(
        default_factory=list
    )  # |A ∩ B| / |A ∪ B|; None where networks differ
    mask_overlap_by_chance: float | None = (
        None  # mean over pairs, of independent masks with as many active weights in each layer
    )
    num_attacked: int | None = None  # images that FGSM and PGD changed, evenly spread over the set
    reliability: dict[str, list[metrics.Bin]] = field(default_factory=dict)  # row -> bins of confidence
    corrupted: dict[str, dict[str, dict[int, dict[str, float]]]] = field(
        default_factory=dict
    )  # row -> corruption -> severity -> metric
    superpositions: dict[str, Ticket] = field(
        default_factory=dict
    )  # row -> the superposed network itself, to be kept as a file


@dataclass(frozen=True)
class FurtherSets:
    """Other sets to look at, each opened when its turn comes, and what else is to be found out on the evaluation set."""

    corrupted: Iterable[tuple[str, int, EvalBatches]] = ()  # corruption, severity, set
    other_classes: Iterable[tuple[str, EvalBatches]] = ()  # name, set of images of none of the classes
    attack: Attack | None = None
    flip: bool = False
    fits_temperature: bool = False


class ChildTracker(Protocol):
    """What logging a report needs of a tracker."""

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None: ...


def evaluate_tickets(
    runs: Sequence[TicketRun],
    setup: Setup,
    *,
    eval_loader: EvalBatches,
    further: FurtherSets = FurtherSets(),
) -> Report | None:
    """Evaluate tickets, in the order given, with the superposition of every run and the ensembles of the first 2, 3, … of all.

    Every rank takes part, with the same tickets; rank 0 has the report, the others None. All
    networks are evaluated in one pass over each set. In memory at a time are one model per ticket,
    the probabilities on one set, and in superposing a few unpacked tickets.

    Args:
        runs: the tickets. They keep their own BatchNorm statistics.
        setup: how networks are made of them, and how they are superposed.
        eval_loader: the evaluation set.
        further: what else is evaluated.

    Raises:
        DataError: there is no ticket.
        IntegrityError: a ticket is damaged, or ranks see different ones.
        NumericsError: as `predict`.
    """
    members = open_members(runs, setup)
    names = [line.name for line in members.lines if line.kind != "ensemble"]
    networks = Networks(members.models, flip=further.flip, autocast_dtype=setup.autocast_dtype, names=names)
    num_classes = members.facts[0].provenance.num_classes
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
    return None if draft is None else draft.finish()


class _Draft:
    """The report while it is made, on rank 0.

    ``probabilities``: [models and attacked rows, images, classes] on the evaluation set.
    """

    def __init__(self, members: Members, probabilities: Tensor, labels: Tensor) -> None:
        self.members = members
        self.labels = labels
        self.of_attacked = probabilities[len(members.models) :]
        self.of_models = probabilities[: len(members.models)]
        self.more: dict[str, dict[str, float]] = {line.name: {} for line in members.lines}
        self.num_attacked: int | None = None
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
        """A temperature fitted on every second image and judged on the others, and the other way round."""
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
            num_attacked=self.num_attacked,
            reliability={name: metrics.reliability(of_line, self.labels) for name, of_line in self.of_lines.items()},
            corrupted=corrupted,
            superpositions=members.superpositions,
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
        last_of_runs = list(
            {each.run: each for each in facts}.values()
        )  # training is counted once a run, up to its last member
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
            more=self.more[line.name],
        )


def _mask_overlaps(members: Members) -> dict[str, Any]:
    """Fields of the report."""
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
    """What the tickets, dense references aside, have in common."""
    facts = [members.facts[line.members[0]] for line in members.tickets] or members.facts
    found: dict[str, str | int | float] = {}
    for key in ("model", "method", "density", "seed"):
        values = list(dict.fromkeys(getattr(each.provenance, key) for each in facts))
        found[key] = values[0] if len(values) == 1 else " ".join(map(str, values))
    return found


def save_json(report: Report, path: Path) -> None:
    """Everything but the superposed networks as JSON. Raises WriteError when it cannot be written."""
    content: dict[str, Any] = asdict(replace(report, superpositions={}))
    del content["superpositions"]
    content["reliability"] = {name: [each._asdict() for each in bins] for name, bins in report.reliability.items()}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def log_report(report: Report, tracker: ChildTracker) -> None:
    """One child run for each row, all with the same metric keys; the parameters of the run are repeated, to find a child by them."""
    for row in report.rows:
        params = report.run | {"name": row.name, "kind": row.kind, "num_members": row.num_members}
        tracker.log_child(row.name, params, {f"eval/{key}": value for key, value in row.numbers.items()})

"""Carry out the evaluations after training, with the parts of ``pipeline.evaluation``. Imports torch."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image

from benchmarks.support.study_cells import EMOJI, data_settings
from benchmarks.support.study_evaluations import WITHOUT, Evaluation
from benchmarks.support.study_results import AUROC, METRICS, MILLISECONDS, OTHER, TICKETS, Row, RunResult, facts_of
from data_prep.arrays import ArrayImages
from data_prep.corrupt import CORRUPTIONS, SMALLEST_SIDE, BetonImages, write_corrupted
from data_prep.images import ImageOptions
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.data.loaders import EvalLoader, open_eval_loader, open_train_loader
from pipeline.datasets.sets import DataSets, inspect, open_data_sets
from pipeline.datasets.sidecar import verify
from pipeline.distributed import session
from pipeline.errors import DataError
from pipeline.evaluation import inputs, metrics
from pipeline.evaluation.members import Line, Members, Setup, open_members, superposed_network
from pipeline.evaluation.networks import evaluation_setup
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.report import Report, evaluate_members, evaluate_tickets
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.sparse import SparseInference
from pipeline.superposition.rules import RULES
from pipeline.training import assembly

SEVERITY, NUM_CORRUPTED = 3, 1000
NUM_HELD_OUT = 2000  # training images with which the rules that choose do so


@dataclass(frozen=True)
class Context:
    """What all runs of an evaluation share."""

    config: Config
    sets: DataSets
    setup: Setup
    loader: EvalLoader
    further: Sequence[Path]  # the sets that are evaluated besides, or instead of, the test set

    def on(self, path: Path) -> EvalLoader:
        """Return the loader, switched to a set."""
        self.loader.switch_to(path)
        return self.loader


def evaluate(
    evaluation: Evaluation, numbers: Collection[int], *, runs: Path, data: Path, extra: Sequence[str] = ()
) -> Iterator[tuple[int, RunResult]]:
    """Yield the result of each number of an evaluation, in their order.

    Args:
        evaluation: which.
        numbers: of ``evaluation.seeds``; their runs are done.
        runs: folder of all runs of the study.
        data: folder of the data sets, by name.
        extra: further settings, those of the training for short trials.

    Raises:
        DataError: a set or a ticket is missing or damaged.
        ServiceError: corrupted images have to be made, and the package for that is missing.
    """
    config = _configured(evaluation, data, extra)
    sets = open_data_sets(config)
    further: Sequence[Path] = ()
    if evaluation.how == "corrupted":
        further = corrupted_sets(sets.val.path)
    elif evaluation.how == "other":
        further = [grey_emoji(data, side=config.data.eval_resolution)]
    with assembly.open_session(config):
        context = _open(config, sets, further)
        for number in numbers:
            folders = [runs / evaluation.cell.name / f"seed={seed}" / "tickets" for seed in evaluation.seeds[number]]
            yield number, _HOW[evaluation.how](context, inputs.open_runs(folders))


def _configured(evaluation: Evaluation, data: Path, extra: Sequence[str]) -> Config:
    """Return the configuration of the cell's runs, with images to choose with where rules do."""
    cell = evaluation.cell
    settings = [*cell.settings, *data_settings(cell, data), "train.threads_per_rank=1", *extra]
    config = load_config(cell.config, settings)
    if evaluation.how != "rules":
        return config
    judged = next(rule for rule in RULES if RULES[rule].is_judged)
    settings += [f"evaluation.superposition={judged}", f"evaluation.held_out={config.data.train}"]
    return load_config(cell.config, [f"evaluation.held_out_images={NUM_HELD_OUT}", *settings])


def _open(config: Config, sets: DataSets, further: Sequence[Path]) -> Context:
    assert sets.train is not None
    device, channels_last = session.device(), config.train.channels_last
    trained_on = open_train_loader(
        sets.train.path,
        config.data,
        global_batch=config.train.global_batch,
        seed=config.seed,
        device=device,
        channels_last=channels_last,
    )
    setup = evaluation_setup(config, train_loader=trained_on, held_out=assembly.open_held_out_loader(config, sets))
    loader = open_eval_loader(
        sets.val.path, config.data, batch=config.evaluation.batch, device=device, channels_last=channels_last
    )
    return Context(config, sets, setup, loader, further)


def _rules(context: Context, runs: Sequence[TicketRun]) -> RunResult:
    members, setup, (run,) = Members(), context.setup, runs
    for rule, num_batches in product(RULES, (setup.settings.recalibration_batches, 0)):
        settings = replace(setup.settings, superposition=rule, recalibration_batches=num_batches)
        model, ticket = superposed_network(run.refs, replace(setup, settings=settings))
        name = ticket.provenance.method + ("" if num_batches else WITHOUT)
        extra = ticket.provenance.extra
        flops, num_members = extra["inference_flops_ratio"], int(extra["num_members"])
        members.add(name, "superposition", model, ticket, run=run, flops=flops, num_members=num_members)
    report = _judged(context, members, context.sets.val.path)
    return _kept(report, context.sets.val.digest, whole=())


def _pairs(context: Context, runs: Sequence[TicketRun]) -> RunResult:
    members = _alone(context, runs)
    if not any(line.kind == "ensemble" for line in members.lines):  # dense runs are in no ensemble of a report
        members.lines.append(Line("ensemble-2", "ensemble", (0, 1), 2))
    report = _judged(context, members, context.sets.val.path)
    found = _kept(report, context.sets.val.digest, whole=("ensemble-2",))
    index = [row["name"] for row in found.rows].index("ensemble-2")  # the runs alone are in the cell's own results
    return RunResult([found.rows[index]], _rows_of(found.predictions, [index]))


def _corrupted(context: Context, runs: Sequence[TicketRun]) -> RunResult:
    members = _alone(context, runs)
    reports = [_judged(context, members, path) for path in context.further]
    parts = [_kept(report, "", whole=_last_of_each(members)) for report in reports]
    rows = [
        dict(of_row[0]) | {metric: fmean(row[metric] for row in of_row) for metric in METRICS if metric in of_row[0]}
        for of_row in zip(*(part.rows for part in parts), strict=True)
    ]
    each = [part.predictions for part in parts]
    return RunResult(
        rows,
        Predictions(
            each[0].names,
            labels=np.concatenate([of.labels for of in each]),
            top1=np.concatenate([of.top1 for of in each], axis=1),
            nll=np.concatenate([of.nll for of in each], axis=1),
            confidence=np.concatenate([of.confidence for of in each], axis=1),
            data_digest=_digest(context.further),
        ),
        num_parts=len(each),
    )


def _other(context: Context, runs: Sequence[TicketRun]) -> RunResult:
    members, (path,) = _alone(context, runs), context.further
    report = _judged(context, members, context.sets.val.path)
    assert report.predictions is not None
    known, networks = report.predictions, Networks(members.models)
    predicted = predict(
        networks, context.on(path), num_classes=context.config.model.num_classes, are_labels_known=False
    )
    assert predicted is not None
    of_lines = [metrics.ensemble(predicted[0][list(line.members)]) for line in members.lines]
    scores = [metrics.max_softmax(of_line) for of_line in of_lines]
    wanted = _last_of_each(members)
    indices = [index for index, line in enumerate(members.lines) if line.name in wanted]
    rows = []
    for index in indices:
        of_known = torch.from_numpy(known.confidence[index]).double()
        facts = facts_of(_as_row(report, index), ())
        rows.append({**facts, AUROC: metrics.ood_auroc(of_known, scores[index])})
    confidence = np.stack([score.numpy().astype(np.float32) for score in scores])
    classes = np.stack([metrics.predicted_classes(of_line).numpy() for of_line in of_lines])
    both = Predictions(
        known.names,
        labels=np.concatenate([known.labels, np.full(confidence.shape[1], OTHER)]),
        top1=np.concatenate([known.top1, classes], axis=1),
        nll=np.concatenate([known.nll, -np.log(confidence)], axis=1),
        confidence=np.concatenate([known.confidence, confidence], axis=1),
        data_digest=_digest([context.sets.val.path, path]),
    )
    return RunResult(rows, _rows_of(both, indices))


def _speed(context: Context, runs: Sequence[TicketRun]) -> RunResult:
    setup = replace(context.setup, sparse=SparseInference(threads=1, side=context.config.data.eval_resolution))
    report = evaluate_tickets(runs, setup, eval_loader=context.on(context.sets.val.path))
    assert report is not None  # there is one rank
    found = _kept(report, context.sets.val.digest, whole=())
    times = [row.more["ms_p50"] for row in report.rows]
    return replace(found, rows=[{**row, MILLISECONDS: time} for row, time in zip(found.rows, times, strict=True)])


_HOW = {"rules": _rules, "pairs": _pairs, "corrupted": _corrupted, "other": _other, "speed": _speed}


def _alone(context: Context, runs: Sequence[TicketRun]) -> Members:
    """Open tickets and ensembles, without superpositions."""
    return open_members(runs, replace(context.setup, train_loader=None))


def _judged(context: Context, members: Members, path: Path) -> Report:
    report = evaluate_members(members, context.setup, eval_loader=context.on(path))
    assert report is not None  # there is one rank
    return report


def _last_of_each(members: Members) -> tuple[str, ...]:
    """Return the names of the last ticket and of the largest ensemble."""
    last = [[line.name for line in members.lines if (line.kind in TICKETS) is is_one][-1:] for is_one in (True, False)]
    return tuple(name for names in last for name in names)


def _kept(report: Report, digest: str, *, whole: Collection[str]) -> RunResult:
    rows = [_as_row(report, index) for index in range(len(report.rows))]
    assert report.predictions is not None
    facts = [facts_of(row, METRICS if row["name"] in whole else METRICS[:1]) for row in rows]
    return RunResult(facts, replace(report.predictions, data_digest=digest))


def _as_row(report: Report, index: int) -> Row:
    row = report.rows[index]
    return {"name": row.name, "kind": row.kind} | {"training_flops_ratio": None} | row.numbers


def _rows_of(of: Predictions, indices: Sequence[int]) -> Predictions:
    names = tuple(of.names[index] for index in indices)
    return replace(of, names=names, top1=of.top1[indices], nll=of.nll[indices], confidence=of.confidence[indices])


def _digest(paths: Sequence[Path]) -> str:
    return hashlib.sha256("".join(inspect(path, level=0).digest for path in paths).encode()).hexdigest()


def corrupted_sets(val: Path) -> list[Path]:
    """Return the corrupted copies of the test set, in ``corrupted`` beside it; those that are missing are made."""
    folder = val.parent / "corrupted"
    paths = [folder / f"{corruption}-{SEVERITY}.beton" for corruption in CORRUPTIONS]
    if not all(path.is_file() for path in paths):
        made = write_corrupted(
            val,
            folder,
            corruptions=CORRUPTIONS,
            severities=[SEVERITY],
            seed=0,
            crop=None,
            work_side=SMALLEST_SIDE,
            num_workers=1,
            subset=NUM_CORRUPTED,
        )
        deque(made, maxlen=0)
    found = inputs.open_sets(val, train=None, corrupted=folder).corrupted
    return [found[corruption, SEVERITY] for corruption in CORRUPTIONS]


def grey_emoji(data: Path, *, side: int) -> Path:
    """Return the emoji of the other test set as grey images of ``side`` pixels; the file is made if it is missing.

    White becomes black, as the background of the images that the networks know.
    """
    path, source = data / "fashion_mnist" / "grey_emoji.beton", data / EMOJI / "val.beton"
    origin = {"kind": "grey_emoji", "of": verify(source).digest}
    with suppress(DataError, FileNotFoundError):
        if verify(path).sidecar["source"] == origin:
            return path
    images = BetonImages.of(source)
    grey = [
        255 - np.asarray(Image.fromarray(images[index][0]).convert("L").resize((side, side), Image.Resampling.BILINEAR))
        for index in range(len(images))
    ]
    from data_prep.writer import write_beton  # imports ffcv

    labels = np.zeros(len(grey), dtype=int)
    write_beton(
        path,
        ArrayImages(np.stack(grey), labels),
        classes=["emoji"],
        options=ImageOptions(write_mode="raw"),
        source=origin,
        num_workers=1,
    )
    return path

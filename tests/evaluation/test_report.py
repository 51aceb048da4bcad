"""The report of tiny tickets: its rows, and that table, JSON, figure and tracker agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.schema import EvaluationConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.attacks import Attack
from pipeline.evaluation.figure import figures
from pipeline.evaluation.members import Setup, superposed_network
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.predictions import load_predictions, save_predictions
from pipeline.evaluation.publish import publish as publish_report
from pipeline.evaluation.report import FurtherSets, Report, evaluate_tickets, final_metrics, log_report, save_json
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.table import format_table
from pipeline.tickets.format import Ticket, decode, encode
from pipeline.tickets.store import TicketStore


def evaluate(
    store: TicketStore, rank_module: Any, *, run: TicketRun | None = None, held_out: Any = None, **settings: Any
) -> Report:
    return evaluate_runs([run or TicketRun(store.list())], rank_module, held_out=held_out, **settings)


def evaluate_runs(runs: list[TicketRun], rank_module: Any, *, held_out: Any = None, **settings: Any) -> Report:
    data = rank_module.Images(0, 1)
    report = evaluate_tickets(
        runs,
        Setup(
            EvaluationConfig(recalibration_batch=4, recalibration_batches=5, **settings),
            build_model=lambda ticket: rank_module.build_model(),
            flops_ratio=lambda provenance, masks: sum(float(mask.sum()) for mask in masks.values()) / 1000,
            train_loader=data,
            held_out=held_out,
        ),
        eval_loader=data,
    )
    assert report is not None
    return report


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, publish: Callable[..., TicketStore]) -> TicketStore:
    return publish(tmp_path_factory.mktemp("tickets"), 3)


def ticket_in(store: TicketStore, index: int) -> Ticket:
    return decode(store.list()[index].path)


def superposition_of(report: Report) -> Ticket:
    (superposed,) = report.superpositions.values()
    return superposed


@pytest.fixture(scope="module")
def report(store: TicketStore, rank_module: Any) -> Report:
    return evaluate(store, rank_module)


def test_rows_and_what_they_cost(report: Report) -> None:
    # conv 2·8·9 = 144, conv 8·4 = 32, linear 16·3 = 48: 224 weights, 112 active; biases 8 + 4 + 3, BatchNorm 2·(8 + 4).
    num_parameters = 112 + 15 + 24
    found = [
        (
            row.name,
            row.kind,
            row.density,
            row.r_s,
            row.training_flops_ratio,
            row.inference_flops_ratio,
            row.num_parameters,
            row.num_members,
        )
        for row in report.rows
    ]
    assert found == [
        ("ticket-0", "ticket", 0.5, 0.5, 0.25, 0.5, num_parameters, 1),
        ("ticket-1", "ticket", 0.5, 0.625, 0.375, 0.5625, num_parameters, 1),
        ("ticket-2", "ticket", 0.5, 0.75, 0.5, 0.625, num_parameters, 1),
        ("superposition-mean", "superposition", 0.5, 0.75, 0.5, 0.112, num_parameters, 3),
        ("ensemble-2", "ensemble", 0.5, 0.625, 0.375, 0.5 + 0.5625, 2 * num_parameters, 2),
        ("ensemble-3", "ensemble", 0.5, 0.75, 0.5, 0.5 + 0.5625 + 0.625, 3 * num_parameters, 3),
    ]
    assert report.num_images == 22
    assert report.run == {"model": "tiny", "method": "rigl", "density": 0.5, "seed": 1}


def test_numbers_are_those_of_the_networks(report: Report, store: TicketStore, rank_module: Any) -> None:
    models = []
    for state in [
        ticket_in(store, 0).state,
        ticket_in(store, 1).state,
        ticket_in(store, 2).state,
        superposition_of(report).state,
    ]:
        models.append(rank_module.build_model())
        models[-1].load_state_dict(state)
    predicted = predict(Networks(models), rank_module.Images(0, 1), num_classes=3)
    assert predicted is not None
    probabilities, labels = predicted
    expected = [*probabilities, probabilities[:2].mean(dim=0), probabilities[:3].mean(dim=0)]
    assert [row.nll for row in report.rows] == [pytest.approx(metrics.nll(of_row, labels)) for of_row in expected]
    assert [row.top1 for row in report.rows] == [pytest.approx(metrics.top1(of_row, labels)) for of_row in expected]
    assert report.disagreement == pytest.approx(metrics.disagreement(probabilities[:3]))
    assert report.kl == pytest.approx(metrics.pairwise_kl(probabilities[:3]))


def test_each_set_is_passed_over_once(store: TicketStore, rank_module: Any) -> None:
    class Counted(rank_module.Images):  # type: ignore[misc,name-defined]
        num_passes = 0

        def batches(self) -> Any:
            self.num_passes += 1
            return super().batches()

    clean, corrupted, other = (Counted(0, 1) for _ in range(3))
    attack = Attack.of([0.0, 0.0], [255.0, 127.5], epsilon=25.5, num_steps=2, num_images=5, device=torch.device("cpu"))
    found = evaluate_tickets(
        [TicketRun(store.list())],
        Setup(
            EvaluationConfig(recalibration_batch=4, recalibration_batches=5),
            build_model=lambda ticket: rank_module.build_model(),
            flops_ratio=lambda provenance, masks: 0.5,
            train_loader=clean,
        ),
        eval_loader=clean,
        further=FurtherSets([("fog", 1, corrupted)], [("other", other)], attack, flip=True, fits_temperature=True),
    )
    assert [each.num_passes for each in (clean, corrupted, other)] == [1, 1, 1]
    assert found is not None and found.num_attacked == 5
    assert all(row.more["pgd_top1"] in (0, 0.2, 0.4, 0.6, 0.8, 1) for row in found.rows if "pgd_top1" in row.more)
    assert "FGSM, PGD: on 5 images." in format_table(found)


def test_means_are_of_the_15_corruptions_and_extra_ones_by_themselves(store: TicketStore, rank_module: Any) -> None:
    others = rank_module.Images(0, 1)
    others.labels = (others.labels + 1) % rank_module.NUM_CLASSES
    data = rank_module.Images(0, 1)
    found = evaluate_tickets(
        [TicketRun(store.list())],
        Setup(EvaluationConfig(), lambda ticket: rank_module.build_model(), lambda provenance, masks: 0.5),
        eval_loader=data,
        further=FurtherSets([("fog", 1, data), ("spatter", 1, others), ("spatter", 2, data)]),
    )
    assert found is not None
    for row in found.rows:
        of = found.corrupted[row.name]
        assert row.more["corrupted_nll"] == row.nll == of["fog"][1]["nll"] != of["spatter"][1]["nll"]
        assert row.more["extra_corrupted_nll"] == pytest.approx((of["spatter"][1]["nll"] + of["spatter"][2]["nll"]) / 2)
    assert "extra corrupted top-1 %" in format_table(found) and "corruptions" in figures(found)


def test_the_superposed_network_is_a_ticket_with_statistics_of_its_own(report: Report, store: TicketStore) -> None:
    superposed = superposition_of(report)
    assert superposed.num_active == 112
    assert superposed.provenance.method == "superposition-mean" and superposed.provenance.extra["num_members"] == 3
    assert not torch.equal(superposed.state["1.running_mean"], ticket_in(store, 2).state["1.running_mean"])
    assert superposed.state["1.num_batches_tracked"] == 5
    assert decode(encode(superposed)).content_digest == superposed.content_digest


def test_without_recalibration_the_statistics_are_those_of_the_last_ticket(
    store: TicketStore, rank_module: Any
) -> None:
    setup = Setup(
        EvaluationConfig(recalibration_batches=0),
        build_model=lambda ticket: rank_module.build_model(),
        flops_ratio=lambda provenance, masks: 0.5,
        train_loader=rank_module.Images(0, 1),
    )
    network, _ = superposed_network(store.list(), setup)
    last = ticket_in(store, 2)
    assert last.buffers and all(torch.equal(network.state_dict()[name], last.state[name]) for name in last.buffers)


def test_layer_scope_keeps_the_counts_of_the_last_ticket(store: TicketStore, rank_module: Any) -> None:
    superposed = superposition_of(evaluate(store, rank_module, prune_scope="layer", superposition="connection_aware"))
    assert superposed.provenance.method == "superposition-connection_aware"
    assert {name: int(mask.sum()) for name, mask in superposed.masks.items()} == {
        name: int(mask.sum()) for name, mask in ticket_in(store, 2).masks.items()
    }


def test_a_weight_for_each_ticket(store: TicketStore, rank_module: Any, report: Report) -> None:
    equal = evaluate(store, rank_module, ticket_weights=[2.0, 2.0, 2.0])
    assert superposition_of(equal).content_digest == superposition_of(report).content_digest
    with pytest.raises(
        ConfigError, match="expected 3 weights, got 2; do: give one for each of the superposed tickets 0, 1, 2"
    ):
        evaluate(store, rank_module, ticket_weights=[2.0, 1.0])


def test_without_the_end_of_exploration(store: TicketStore, rank_module: Any, report: Report) -> None:
    first, *rest = store.list()
    explored = dataclasses.replace(first, provenance=dataclasses.replace(first.provenance, phase="exploration"))
    run = TicketRun([explored, *rest])
    without = evaluate(store, rank_module, run=run, with_exploration=False)
    assert [row.num_members for row in without.rows] == [
        1,
        1,
        1,
        2,
        2,
        3,
    ]  # superposed are two, ensembles are as they were
    assert superposition_of(without).provenance.extra["num_members"] == 2
    assert (
        superposition_of(evaluate(store, rank_module, run=run)).content_digest
        == superposition_of(report).content_digest
    )
    assert not evaluate(store, rank_module, run=TicketRun([explored, rest[0]]), with_exploration=False).superpositions


@pytest.mark.parametrize("rule", ["interpolation", "greedy_soup"])
def test_a_superposition_chosen_with_held_out_images(store: TicketStore, rank_module: Any, rule: str) -> None:
    data = rank_module.Images(0, 1)
    report = evaluate(store, rank_module, superposition=rule, held_out=data, coefficients=[0.1, 0.5])
    row = next(row for row in report.rows if row.name == f"superposition-{rule}")
    twice = [TicketRun([ref, dataclasses.replace(ref, index=ref.index + 3)]) for ref in store.list()]
    alone = [evaluate(store, rank_module, superposition="greedy_soup", held_out=data, run=run) for run in twice]
    recalibrated = [
        row.top1 for each in alone for row in each.rows if row.kind == "superposition"
    ]  # of a ticket with itself
    assert row.top1 >= (
        recalibrated[-1] if rule == "interpolation" else max(recalibrated)
    )  # here held out is what is evaluated
    assert 1 <= row.num_members <= 3 and row.num_parameters == 151
    with pytest.raises(ConfigError, match=f"superposition '{rule}' needs a held-out set"):
        evaluate(store, rank_module, superposition=rule)


def test_a_single_ticket_is_reported_alone(
    tmp_path: Path, publish: Callable[..., TicketStore], rank_module: Any
) -> None:
    report = evaluate(publish(tmp_path / "tickets", 1), rank_module)
    assert [row.name for row in report.rows] == ["ticket-0"]
    assert report.disagreement is None and report.kl is None and not report.superpositions
    assert "Between tickets" not in format_table(report)


def test_no_ticket(tmp_path: Path, rank_module: Any) -> None:
    with pytest.raises(DataError, match="no ticket to evaluate"):
        evaluate(TicketStore(tmp_path), rank_module)


def test_table(report: Report) -> None:
    lines = format_table(report).splitlines()
    assert lines[0].split() == [
        "top-1",
        "%",
        "NLL",
        "ECE",
        "%",
        "density",
        "R_s",
        "train",
        "×",
        "test",
        "×",
        "parameters",
    ]
    assert (
        len({len(line) for line in lines[:8]}) == 1 and len(lines[0]) <= 88
    )  # with superposition-connection_aware: 100
    assert (
        lines[2].startswith("ticket-0 ")
        and lines[5].startswith("superposition-mean ")
        and lines[7].startswith("ensemble-3 ")
    )
    assert lines[5].split()[1] == f"{100 * report.rows[3].top1:.2f}" and lines[5].split()[-1] == "151"
    assert lines[8] == "model tiny, method rigl, density 0.5, seed 1; 22 images."
    assert lines[9] == "train ×, test ×: FLOPs relative to a dense network, trained for 7.5 epochs."
    assert lines[10].startswith("Between tickets: ")


def test_json(report: Report, tmp_path: Path) -> None:
    save_json(report, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == [row.name for row in report.rows]
    assert (
        content["rows"][3]["top1"] == report.rows[3].top1
        and content["kl"] == report.kl
        and not {"superpositions", "predictions"} & set(content)
    )


def test_predictions_of_every_image_recompute_the_rows(report: Report, tmp_path: Path) -> None:
    assert report.predictions is not None
    save_predictions(report.predictions, tmp_path / "predictions.npz", data_digest="ab12")
    found = load_predictions(tmp_path / "predictions.npz")
    assert found.names == tuple(row.name for row in report.rows)
    is_right = found.top1 == found.labels
    assert is_right.mean(axis=1).tolist() == [row.top1 for row in report.rows]
    assert found.nll.mean(axis=1) == pytest.approx([row.nll for row in report.rows], rel=1e-6)
    for row, right, confidence in zip(report.rows, is_right, found.confidence, strict=True):
        bins = np.ceil(confidence.astype(np.float64) * 15)  # 1 to 15
        gaps = [abs(float((right[bins == i] - confidence[bins == i]).sum())) for i in range(1, 16)]
        assert sum(gaps) / len(right) == pytest.approx(row.ece, rel=1e-5)


def test_every_child_run_has_the_same_metrics(report: Report) -> None:
    children: dict[str, tuple[dict[str, object], dict[str, float]]] = {}

    class Tracker:
        def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
            children[name] = (dict(params), dict(metrics))

    log_report(report, Tracker())
    assert list(children) == [row.name for row in report.rows]
    keys = {
        "top1",
        "top5",
        "nll",
        "ece",
        "adaptive_ece",
        "brier",
        "density",
        "r_s",
        "training_flops_ratio",
        "inference_flops_ratio",
        "num_parameters",
    }
    for _, values in children.values():
        assert values.keys() == {f"eval/{key}" for key in keys} and all(
            type(value) is float for value in values.values()
        )
    params, values = children["ensemble-2"]
    assert params == {
        "model": "tiny",
        "method": "rigl",
        "density": 0.5,
        "seed": 1,
        "name": "ensemble-2",
        "kind": "ensemble",
        "num_members": 2,
    }
    assert values["eval/nll"] == report.rows[4].nll


def test_runs_are_compared_by_their_last_and_best_ticket_superposition_and_largest_ensemble(report: Report) -> None:
    accuracies = (0.2, 0.6, 0.4, 0.7, 0.8, 0.75)  # tickets 0, 1, 2, superposition, ensembles of 2 and 3
    rows = [dataclasses.replace(row, top1=top1) for row, top1 in zip(report.rows, accuracies, strict=True)]
    found = final_metrics(dataclasses.replace(report, rows=tuple(rows)))
    assert {key: value for key, value in found.items() if key.endswith("_top1")} == {
        "eval/last_ticket_top1": 0.4,
        "eval/best_ticket_top1": 0.6,
        "eval/superposition_top1": 0.7,
        "eval/ensemble_top1": 0.75,
    }
    assert found["eval/best_ticket_nll"] == rows[1].nll and found["eval/ensemble_ece"] == rows[5].ece
    dense = [dataclasses.replace(rows[0], kind="dense")]
    of_dense = final_metrics(dataclasses.replace(report, rows=tuple(dense)))
    assert of_dense["eval/last_ticket_top1"] == 0.2 and "eval/superposition_top1" not in of_dense


class Tracker:
    def __init__(self) -> None:
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...

    def log_child(self, *_: object) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags


def test_what_several_runs_leave_is_under_the_names_of_their_rows(
    store: TicketStore, rank_module: Any, tmp_path: Path
) -> None:
    """Run ``short`` has only one ticket besides the end of exploration.

    It has no superposition of its own, and gets none of another run.
    """
    refs = store.list()
    explored = [
        dataclasses.replace(ref, provenance=dataclasses.replace(ref.provenance, phase="exploration")) for ref in refs
    ]
    dense = [
        dataclasses.replace(ref, provenance=dataclasses.replace(ref.provenance, method="dense")) for ref in refs[:1]
    ]
    runs = [
        TicketRun([explored[0], refs[1]], "short"),
        TicketRun([explored[0], *refs[1:]], "long"),
        TicketRun(refs[:2], "first"),
        TicketRun(dense, "dense"),
    ]
    report = evaluate_runs(runs, rank_module, with_exploration=False)
    for name in (
        "fog-superposition-moving.safetensors",
        "table.txt",
        "figures/corruptions.pdf",
        "mine.txt",
        "figures/mine.pdf",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    tracker: Any = Tracker()
    publish_report(report, tmp_path, tracker, runs=runs, settings={}, data_digest="ab12")
    written = {path.stem: decode(path).content_digest for path in tmp_path.glob("*.safetensors")}
    alone = [superposition_of(evaluate(store, rank_module, run=TicketRun(some))) for some in (refs[1:], refs[:2])]
    assert list(report.superpositions) == ["long-superposition-mean", "first-superposition-mean"] and len(written) == 2
    for superposed, (name, ticket) in zip(alone, report.superpositions.items(), strict=True):
        assert written[name] == ticket.content_digest
        assert all(torch.equal(tensor, ticket.state[key]) for key, tensor in superposed.state.items())
    assert [ref.path.name for ref in TicketStore(tmp_path).list()] == [
        f"{run}-superposition-mean.safetensors" for run in ("long", "first")
    ]
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "figures" / "mine.pdf").exists()
    assert (
        not (tmp_path / "figures" / "corruptions.pdf").exists() and "before" not in (tmp_path / "table.txt").read_text()
    )
    page = (tmp_path / "report.html").read_text()
    names = [
        "short-ticket-0",
        "short-ticket-1",
        *(f"long-ticket-{i}" for i in range(3)),
        "first-ticket-0",
        "first-ticket-1",
        "dense-dense-0",
    ]
    assert list(tracker.tags) == names and all(f"<td>{name}<" in page for name in names)

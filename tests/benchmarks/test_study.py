"""The study: its cells can be trained, its rule for verdicts, and its intervals computed again from the predictions."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study
from benchmarks.support import study_results
from benchmarks.support.study_cells import CELLS, EMOJI, FASHION, LENGTHS, NUM_SEEDS
from benchmarks.support.study_claims import (
    BEST,
    HIGHER_IS_BETTER,
    LAST,
    WORTH,
    Contrast,
    beside,
    contrasts,
    difference_of,
    judge,
    seeds_needed,
    values_of,
    verdict_of,
)
from benchmarks.support.study_evaluations import EVALUATIONS, WITHOUT
from benchmarks.support.study_figure import draw
from benchmarks.support.study_results import (
    AUROC,
    METRICS,
    OTHER,
    TICKETS,
    TOLERANCES,
    CellResult,
    decode_nll,
    encode_nll,
    metric_of,
)
from benchmarks.support.study_tables import interval, tables
from pipeline.config.load import load_config
from pipeline.evaluation.paired import Difference, paired_difference
from pipeline.evaluation.predictions import Predictions
from pipeline.models import build
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.structure import Layout
from pipeline.superposition.rules import RULES

PILOT_SEEDS = {9001, 9002}
KEPT = functools.cache(functools.partial(study_results.load, folder=study.RESULTS))


def test_every_cell_has_a_valid_configuration_and_its_seeds() -> None:
    for cell in CELLS.values():
        data, density, _ = cell.name.split("/")
        config = load_config(cell.config, list(cell.settings))
        assert config.sparsity.density == float(density) and config.name == f"study_{data}"
        assert len(cell.seeds) >= NUM_SEEDS >= 8 and not PILOT_SEEDS & set(cell.seeds)


def test_every_structure_fits_the_layers_of_its_cell() -> None:
    structured = 0
    for cell in CELLS.values():
        config = load_config(cell.config, list(cell.settings))
        if config.sparsity.structure in (None, "none"):
            continue
        model = build(config.model.name, num_classes=10, args=config.model.args)
        for name, weight in sparse_weights(model, config.sparsity.dense_layers).items():
            assert not Layout(weight.shape, config.sparsity.structure).unsupported_reason(), (cell.name, name)
        structured += 1
    assert structured == 3


@pytest.mark.parametrize("data", [FASHION, EMOJI])
def test_the_sparse_cells_of_a_claim_have_one_budget(data: str) -> None:
    for what in ("rigl_itop", "edst", "sup_rigl"):
        plan = load_config("study_" + data, list(CELLS[f"{data}/0.1/{what}"].settings)).plan
        parts = [plan.exploration.length] + [plan.refinement.length] * plan.num_refinements if plan.refinement else []
        epochs = [float(part.removesuffix(" epochs")) for part in parts or [plan.exploration.length]]
        assert sum(epochs) == pytest.approx(LENGTHS[data], rel=1e-3)


def test_every_contrast_names_cells_and_each_paper_has_a_primary_claim() -> None:
    found = contrasts()
    assert {name for each in found for name, _ in (each.better, each.other)} <= CELLS.keys()
    named = {name for each in beside() for name, _ in (each.better, each.other)}
    assert named <= CELLS.keys() | EVALUATIONS.keys()
    assert EVALUATIONS["fashion_mnist/0.1/dst_half+pairs"].seeds == {k: (2 * k, 2 * k + 1) for k in range(8)}
    assert {each.paper for each in found if each.is_primary} == {"ITOP", "FreeTickets", "Sup-tickets"}


def difference(low: float, high: float, *, num_pairs: int = 8) -> Difference:
    return Difference((low + high) / 2, low, high, num_pairs)


def test_the_rule_for_a_verdict() -> None:
    better = functools.partial(verdict_of, worth=0.5)
    assert better(difference(0.1, 0.9))[0] == "reproduced"
    assert better(difference(-0.6, 0.4))[0] == "not reproduced"  # a difference worth having is excluded
    assert better(difference(-0.6, 0.6))[0] == "not decidable"
    no_worse = functools.partial(verdict_of, worth=0.5, is_no_worse=True)
    assert no_worse(difference(-0.4, 0.9))[0] == "reproduced"
    assert no_worse(difference(-0.9, -0.1))[0] == "not reproduced"
    assert no_worse(difference(-0.6, 0.4))[0] == "not decidable"


def test_the_seeds_that_would_decide_by_hand() -> None:
    # 8 pairs, mean 0.2, half width 2.3646·s/√8 = 0.4, so s = 0.47846; the bounds are 0 and 0.5, the farther 0.3 away.
    # t(11) = 2.2010 for 12 seeds: 2.2010·0.47846/√12 = 0.30401, too much; 13 seeds: 2.1788·0.47846/√13 = 0.28913.
    assert seeds_needed(difference(-0.2, 0.6), least=0.0, enough=0.5) == 13


def made(tmp_path: Path, *, num_seeds: int, shift: float = 0.0) -> dict[int, Path]:
    """Write reports of two tickets and an ensemble with known metrics, from made-up probabilities."""
    import torch

    from pipeline.evaluation import metrics
    from pipeline.evaluation.predictions import save_predictions

    folders = {}
    labels = torch.arange(2000) % 10
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        logits = torch.randn(3, 2000, 10)
        logits[:, torch.arange(2000), labels] += 2.5 + shift + torch.tensor([0.0, 0.1, 0.5])[:, None]
        probabilities = logits.softmax(2)
        rows = [
            {
                "name": name,
                "kind": kind,
                "top1": metrics.top1(each, labels),
                "nll": metrics.nll(each, labels),
                "ece": metrics.ece(each, labels),
                "density": 0.05,
                "r_s": 0.5,
                "training_flops_ratio": 0.1,
                "inference_flops_ratio": 0.07,
            }
            for name, kind, each in zip(
                ("ticket-0", "ticket-1", "ensemble-2"), ("ticket", "ticket", "ensemble"), probabilities, strict=True
            )
        ]
        folder = folders[seed] = tmp_path / f"{shift}-{seed}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"rows": rows}))
        predictions = Predictions(
            tuple(str(row["name"]) for row in rows),
            labels.numpy().astype(np.uint16),
            torch.stack([metrics.predicted_classes(each) for each in probabilities]).numpy().astype(np.uint16),
            torch.stack([metrics.nll_of_images(each, labels) for each in probabilities]).numpy().astype(np.float32),
            probabilities.amax(dim=2).numpy(),
        )
        save_predictions(predictions, folder / "predictions.npz", data_digest="d")
    return folders


def test_results_are_kept_in_little_space_and_computed_again_from_the_predictions(tmp_path: Path) -> None:
    study_results.save(study_results.collect(made(tmp_path, num_seeds=3), kinds=["ensemble"]), "a/0.05/b", tmp_path)
    result = study_results.load("a/0.05/b", tmp_path)
    assert result is not None and sorted(result.rows) == [0, 1, 2]
    assert (tmp_path / "a-0.05-b.npz").stat().st_size < 1.6 * result.top1.size  # random: far more than of networks
    for row in ("ticket-1", "ensemble-2"):  # the last ticket and what a claim is about
        for metric in METRICS:
            again = result.recomputed(row, metric)
            assert again == pytest.approx(result.values(row, metric), abs=TOLERANCES[metric])
    assert result.recomputed("ticket-0", "top1") == result.values("ticket-0", "top1")
    with pytest.raises(KeyError, match="nll"):  # of the others only the classes are kept
        result.recomputed("ticket-0", "nll")
    one, other = result.top1[1, 0], result.top1[1, 1]
    assert result.disagreement()[1] == (one != other).mean() > 0
    codes = encode_nll(np.array([0, 0.0025, 1, 88, 1000], dtype=np.float32))
    assert decode_nll(codes).tolist() == pytest.approx([0, 0.0025, 1, 88, 88], rel=0.06, abs=3e-4)


def test_results_of_lost_runs_are_kept_and_only_missing_seeds_are_trained(tmp_path: Path) -> None:
    reports = made(tmp_path, num_seeds=4)
    first, rest = (
        study_results.collect({seed: reports[seed] for seed in some}, kinds=["ensemble"])
        for some in ((0, 2), (1, 2, 3))
    )
    whole, merged = study_results.collect(reports, kinds=["ensemble"]), study_results.merge(first, rest)
    assert list(merged.rows) == [0, 1, 2, 3] and merged.values("ticket-1", "nll") == whole.values("ticket-1", "nll")
    assert merged.recomputed("ensemble-2", "ece") == whole.recomputed("ensemble-2", "ece")
    cell = replace(CELLS["fashion_mnist/0.1/static"], seeds=(0, 1, 2, 3))
    assert study.missing(cell, None, tmp_path).seeds == (0, 1, 2, 3)
    assert study.missing(cell, first, tmp_path).seeds == (1, 3)
    (tmp_path / cell.name / "seed=2").mkdir(parents=True)
    assert study.missing(cell, first, tmp_path).seeds == (1, 2, 3)
    assert study.missing(cell, whole, tmp_path).seeds == ()


def test_a_contrast_is_judged_by_the_last_and_the_best_ticket(tmp_path: Path) -> None:
    cells: dict[str, CellResult | None] = {
        f"a/0.05/{what}": study_results.collect(made(tmp_path, num_seeds=8, shift=shift), kinds=[])
        for what, shift in (("good", 0.5), ("poor", 0.0))
    }
    poor = cells["a/0.05/poor"]
    assert poor is not None
    best, last = (values_of(poor, row, "top1") for row in (BEST, LAST))
    assert last == poor.values("ticket-1", "top1") and all(best[seed] >= last[seed] for seed in range(8))
    for metric in WORTH:
        for one, other, word in (("good", "poor", "reproduced"), ("poor", "good", "not reproduced")):
            contrast = Contrast("P", "c", (f"a/0.05/{one}", LAST), (f"a/0.05/{other}", LAST), metric=metric)
            if metric != "ece":
                assert judge(contrast, cells.__getitem__, num_seeds=8).word == word
            assert judge(contrast, cells.__getitem__, num_seeds=9).word == "not yet run"
    assert judge(contrast, lambda _: None, num_seeds=8).word == "not yet run"


def test_the_area_under_the_curve_by_hand() -> None:
    labels = np.array([0, 1, 1, OTHER, OTHER], np.uint8)
    top1 = np.array([0, 1, 0, 1, 0], np.uint8)
    nll = encode_nll(-np.log(np.array([0.9, 0.6, 0.2, 0.7, 0.5], np.float32)))  # of the label, or of the class
    confidence = np.array([0, 0, round(0.8 * 255), 0, 0], np.uint8)  # of the wrong one
    # known 0.9, 0.6, 0.8 against 0.7, 0.5: 2 + 1 + 2 of 6 pairs in the right order
    assert metric_of(AUROC, labels, top1, nll, confidence) == pytest.approx(5 / 6)


def kept() -> dict[str, CellResult]:
    """Return all results that are kept, by cell or evaluation."""
    found = {name: KEPT(name) for name in (*CELLS, *EVALUATIONS)}
    return {name: result for name, result in found.items() if result is not None}


def test_every_kept_interval_can_be_computed_from_the_kept_predictions() -> None:
    for name, result in kept().items():
        assert set(result.rows) <= set(CELLS[name].seeds if name in CELLS else EVALUATIONS[name].seeds)
        for row in next(iter(result.rows.values())):
            for metric in (each for each in (*METRICS, AUROC) if each in row):
                again = result.recomputed(str(row["name"]), metric)
                assert again == pytest.approx(result.values(str(row["name"]), metric), abs=TOLERANCES[metric])
    for contrast in [*contrasts(), *beside()]:
        found = difference_of(contrast, KEPT)
        pair = [KEPT(name) for name, _ in (contrast.better, contrast.other)]
        if found is None or found.low is None:
            continue
        by_hand = paired_difference(
            *(
                _recomputed(each, row, contrast.metric)
                for each, (_, row) in zip(pair, (contrast.better, contrast.other), strict=True)
            )
        )
        assert by_hand is not None
        sign = 1 if HIGHER_IS_BETTER[contrast.metric] else -1
        assert sign * by_hand.mean == pytest.approx(found.mean, abs=2 * TOLERANCES[contrast.metric])


def test_what_is_kept_stays_small() -> None:
    assert sum(path.stat().st_size for path in study.RESULTS.glob("*")) < 8e6


def _recomputed(result: CellResult | None, row: str, metric: str) -> dict[int, float]:
    assert result is not None
    if row not in (LAST, BEST):
        return result.recomputed(row, metric)
    tickets = [str(each["name"]) for each in next(iter(result.rows.values())) if each["kind"] in TICKETS]
    if row == LAST:
        return result.recomputed(tickets[-1], metric)
    assert metric == "top1"  # of the others only the classes are kept
    top1 = [result.recomputed(name, "top1") for name in tickets]
    return {seed: max(of[seed] for of in top1) for seed in result.rows}


def test_the_document_shows_what_is_kept() -> None:
    """The tables stand in the page of the study, the verdicts of one paper in that of the papers."""
    study_page, papers_page = ((study.ROOT / "docs" / name).read_text() for name in ("study.md", "papers.md"))
    found = tables(KEPT)
    assert [name for name in found if f"<!-- {name} -->\n{found[name]}<!-- end" not in study_page + papers_page] == []
    assert [line for line in study_page.splitlines() if line.startswith("<!-- ") and "end of" not in line] == [
        f"<!-- {name} -->" for name in ("claims", "beside", "rules", "disagreement", "cells")
    ]


@functools.cache
def made_up(name: str) -> CellResult:
    """Return results of a cell or an evaluation with the rows that its runs would have, of 20 images."""
    cell = EVALUATIONS[name].cell if name in EVALUATIONS else CELLS[name]
    what, how = cell.name.rsplit("/", 1)[1], name.partition("+")[2]
    tickets = [f"ticket-{n}" for n in range(4 if cell.kinds else 1)]
    names = [*tickets, "superposition-mean", *(f"ensemble-{n}" for n in (2, 3, 4))][: None if cell.kinds else 1]
    if how in ("rules", "pairs"):
        ends = ("", WITHOUT)
        names = [f"superposition-{rule}{end}" for rule in RULES for end in ends] if how == "rules" else ["ensemble-2"]
    seeds = EVALUATIONS[name].seeds if name in EVALUATIONS else cell.seeds
    random, labels = np.random.default_rng(len(what)), np.arange(20) % 10
    found = {}
    for seed in seeds:
        rows = [
            {"name": each, "kind": each.partition("-")[0]}
            | dict.fromkeys(METRICS if how != "other" else [AUROC], random.uniform(0.8, 0.9))
            | dict.fromkeys([*study_results.COSTS, study_results.MILLISECONDS], 0.5)
            for each in names
        ]
        arrays = [random.uniform(0.1, 1, (len(rows), 20)) for _ in range(2)]
        predictions = Predictions(tuple(names), labels, random.integers(0, 10, (len(rows), 20)), *arrays, "d")
        found[seed] = study_results.RunResult(rows, predictions)
    return study_results.gather(found)


def test_tables_and_figure_of_all_results_and_of_none() -> None:
    whole, none = tables(made_up), tables(lambda _: None)
    assert whole.keys() == none.keys()
    for name, table in whole.items():
        assert "not yet run" not in table and "not yet run" in none[name], name
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in whole.values())
    assert whole["rules"].count("`greedy_soup`") == 3 and whole["beside"].count("AUROC") == 1
    assert {draw(load)[:4] for load in (made_up, lambda _: None)} == {b"\x89PNG"}


def test_the_half_width_of_an_interval_by_hand() -> None:
    # 0.80, 0.82, 0.84: mean 0.82, deviation 0.02, t(2) = 4.3027: 4.3027·0.02/√3 = 0.0497
    assert interval([0.80, 0.82, 0.84], "top1") == "82.00 ± 4.97"

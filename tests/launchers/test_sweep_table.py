"""The table of a sweep equals a computation by numpy and scipy from the saved predictions, in every format."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from launchers import sweep_table
from launchers.sweep_members import Record, load_record, opened_record
from pipeline.errors import ConfigError, DataError, IntegrityError
from pipeline.evaluation.predictions import Predictions, load_predictions, save_predictions
from tests.support.sweeps import NAMES, leave_report, members


@pytest.fixture(scope="module")
def finished(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, dict[str, Predictions]]:
    """2 methods × 2 densities × 4 seeds; seed 3 of one has failed, and one of another has not run."""
    sets, folder = ["sparsity.method=set,rigl_itop", "sparsity.density=0.05,0.1"], tmp_path_factory.mktemp("finished")
    all_members = members(configuration, folder, sets, seeds=range(4))
    record = opened_record(folder, all_members)
    predictions = {}
    for number, member in enumerate(all_members):
        if member.name == "method=rigl_itop,density=0.1,seed=3":
            record.members[member.name]["exit_code"] = 79
        elif member.name != "method=rigl_itop,density=0.05,seed=1":
            skill = 0.7 + 0.002 * number
            predictions[member.name] = leave_report(folder / member.name / "report", member.seed, skill)
            record.members[member.name]["exit_code"] = 0
    record.save()
    return record, predictions


def test_the_table_equals_a_computation_from_the_predictions(finished: tuple[Record, dict[str, Predictions]]) -> None:
    record, predictions = finished
    table = sweep_table.collect(record, baseline="density=0.1, method=set")
    assert [(row.network, row.combination) for row in table.rows[:4]] == [
        ("last ticket", f"method={method},density={density}")
        for method in ("set", "rigl_itop")
        for density in ("0.05", "0.1")
    ]
    assert [row.network for row in table.rows[4:]] == ["superposition"] * 4 + ["largest ensemble"] * 4
    row = table.rows[3]  # seeds 0, 1, 2
    at = NAMES.index("ticket-1")

    def nll(method: str, density: str, seed: int) -> float:
        return float(predictions[f"method={method},density={density},seed={seed}"].nll[at].mean(dtype=np.float64))

    ours, theirs = ([nll(method, "0.1", seed) for seed in range(3)] for method in ("rigl_itop", "set"))
    assert row.means["nll"].mean == pytest.approx(np.mean(ours))
    assert row.means["nll"].standard_error == pytest.approx(stats.sem(ours))
    found, expected = row.differences["nll"], stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high, found.num_pairs) == pytest.approx((expected.low, expected.high, 3))
    right = [
        {
            seed: (of.top1[at] == of.labels).mean()
            for seed in range(3)
            if (of := predictions[f"method={method},density=0.1,seed={seed}"])
        }
        for method in ("rigl_itop", "set")
    ]
    assert row.differences["top1"].mean == pytest.approx(np.mean([right[0][s] - right[1][s] for s in range(3)]))
    assert table.rows[1].differences == {} and table.rows[2].differences["nll"].num_pairs == 3  # seeds 0, 2, 3


def test_every_network_against_one(finished: tuple[Record, dict[str, Predictions]]) -> None:
    table = sweep_table.collect(finished[0], against="last ticket")
    by_name = {(row.network, row.combination): row for row in table.rows}
    base = by_name["last ticket", "method=set,density=0.05"]
    assert base.differences == {} and all(row.differences for row in table.rows if row is not base)
    ensemble = by_name["largest ensemble", "method=set,density=0.05"]
    ours, theirs = ([row.by_seed["nll"][seed] for seed in range(4)] for row in (ensemble, base))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = ensemble.differences["nll"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    text = sweep_table.render(table, "text")
    assert "largest ensemble, difference from method=set,density=0.05, last ticket\n" in text


def test_every_format_says_the_same(finished: tuple[Record, dict[str, Predictions]]) -> None:
    record, _ = finished
    table = sweep_table.collect(record)
    row = next(row for row in table.rows if row.network == "superposition" and row.values["method"] == "rigl_itop")
    text, markdown = sweep_table.render(table, "text"), sweep_table.render(table, "markdown")
    mean, difference = row.means["top1"], row.differences["nll"]
    shown = f"{100 * mean.mean:.2f} ± {100 * (mean.standard_error or 0):.2f}"
    interval = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    assert re.search(rf"^rigl_itop +0.05 +3 +{re.escape(shown)} ", text, re.MULTILINE) and interval in text
    assert f"| rigl_itop | 0.05 | 3 | {shown} |" in markdown and f" {interval} |" in markdown
    assert "failed: method=rigl_itop,density=0.1,seed=3: exit code 79, log " in text and "not done: 1 run\n" in text
    assert max(map(len, text.splitlines()[:40])) <= 120
    lines = list(csv.DictReader(io.StringIO(sweep_table.render(table, "csv"))))
    (line,) = (each for each in lines if each["network"] == row.network and row.values.items() <= each.items())
    assert float(line["top1"]) == mean.mean and float(line["nll_difference_high"]) == difference.high
    content = json.loads(sweep_table.render(table, "json"))
    assert content["rows"][0]["by_seed"]["top1"].keys() == {"0", "1", "2", "3"} and content["confidence"] == 0.95


def test_other_states_of_a_training_stand_apart(configuration: Path, tmp_path: Path) -> None:
    (one,) = members(configuration, tmp_path, [])
    record = opened_record(tmp_path, [one])
    leave_report(tmp_path / one.name / "report", 0, 0.5)
    path = tmp_path / one.name / "report" / "report.json"
    rows = json.loads(path.read_text())["rows"]
    more = [row | {"name": f"average-{row['name']}", "is_apart": True, "nll": row["nll"] + 1} for row in rows[:2]]
    path.write_text(json.dumps({"rows": [*rows, *more]}))
    record.members[one.name]["exit_code"] = 0
    found = {row.network: row.means["nll"].mean for row in sweep_table.collect(record).rows}
    assert list(found) == ["last ticket", "superposition", "largest ensemble", "last ticket, average"]
    assert found["last ticket, average"] == found["last ticket"] + 1 == rows[1]["nll"] + 1


def test_what_cannot_be_compared(finished: tuple[Record, dict[str, Predictions]], tmp_path: Path) -> None:
    shutil.copytree(finished[0].folder, tmp_path, dirs_exist_ok=True)
    record = load_record(tmp_path) or pytest.fail("no record")
    with pytest.raises(ConfigError, match=r"--baseline method=x: is not a combination .* method=set,density=0\.05 or"):
        sweep_table.collect(record, baseline="method=x")
    report = tmp_path / "method=set,density=0.1,seed=0" / "report"
    content = (report / "report.json").read_text()
    (report / "report.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"report\.json: is not a report"):
        sweep_table.collect(record)
    (report / "report.json").write_text(content)
    save_predictions(load_predictions(report / "predictions.npz"), report / "predictions.npz", data_digest="other")
    with pytest.raises(DataError, match="were evaluated on different images"):
        sweep_table.collect(record)

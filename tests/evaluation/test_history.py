"""What a run's journal tells about its training, and the figures of it, with numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.evaluation import training_figures
from pipeline.evaluation.history import History, read_history
from pipeline.evaluation.report import Report
from pipeline.tracking import open_tracker


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Of a run of four steps, two an epoch, that was killed after step 2 and resumed after step 1."""
    with open_tracker(TrackingConfig(backend="jsonl"), output_dir=tmp_path, run_name="demo") as tracker:
        for step in (0, 1, 2, "resumed", 2, 3):
            if step == "resumed":
                tracker.resume_from(2)
                continue
            assert isinstance(step, int)
            is_again = any(
                "resumed_from_step" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
            )
            tracker.log_metrics({"train/epoch": (step + 1) / 2, "train/lr": 0.1 * (4 - step)}, step=step)
            tracker.log_metrics({"val/top1": 0.1 * step + (0.05 if is_again else 0)}, step=step)
            if step in (0, 2):
                drop = 0.5 if step == 0 else 0.25
                tracker.log_metrics({"mask/drop_fraction": drop, "mask/turnover": drop / 2}, step=step)
                density = {"stem.weight": 0.1, "fc.weight": 0.3 if is_again else 0.9}
                tracker.log_layers(density, {"stem.weight": 0.123456, "fc.weight": 0.4}, step=step)
    found = read_history(tmp_path)
    assert found is not None
    return found


def test_steps_that_were_computed_twice_count_once(history: History) -> None:
    assert history.steps_per_epoch == 2
    assert history.curve("val/top1") == ([0.5, 1.0, 1.5, 2.0], pytest.approx([0.0, 0.1, 0.25, 0.35]))
    assert history.curve("val/nll") == ([], [])
    assert history.of_layer("fc.weight") == ([0.5, 1.5], [0.9, 0.3], [0.4, 0.4])
    assert history.of_layer("stem.weight") == ([0.5, 1.5], [0.1, 0.1], [0.12346, 0.12346])


def test_a_folder_without_training_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"run": "a", "name": "a", "experiment": "e", "time": 1.0}) + "\n{"
    )
    assert read_history(tmp_path) is None


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_figures_show_layers_rates_and_cycles(history: History) -> None:
    rows = [
        SimpleNamespace(name=name, kind=kind, top1=top1, num_members=num)
        for name, kind, top1, num in (
            ("ticket-0", "ticket", 0.5, 1),
            ("ticket-1", "ticket", 0.6, 1),
            ("superposition-mean", "superposition", 0.65, 2),
            ("ensemble-2", "ensemble", 0.7, 2),
        )
    ]
    report = cast(Report, SimpleNamespace(rows=rows))
    drawn = training_figures.figures(history, report, {"ticket-0": 2, "ticket-1": 4})
    assert set(drawn) == set(training_figures.NAMES)
    density, r_s = drawn["layers"][1].axes
    assert lines_of(density) == {"stem": ([0.5, 1.5], [0.1, 0.1]), "fc": ([0.5, 1.5], [0.9, 0.3])}
    assert lines_of(r_s)["fc"] == ([0.5, 1.5], [0.4, 0.4])
    rates = {axes.get_ylabel(): axes.get_lines()[0] for axes in drawn["rates"][1].axes}
    assert list(rates["learning rate"].get_ydata()) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert list(rates["mask turnover"].get_ydata()) == [0.25, 0.125]
    assert list(rates["drop fraction"].get_xdata()) == [0.5, 1.5]
    cycles = lines_of(drawn["cycles"][1].axes[0])
    assert cycles["ticket"] == ([1.0, 2.0], [50.0, 60.0])
    assert cycles["ensemble"] == ([2.0], [70.0])
    assert set(cycles["superposition-mean"][1]) == {65.0}
    assert cycles["during training"][0] == [0.5, 1.0, 1.5, 2.0]

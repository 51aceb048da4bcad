"""``python -m benchmarks.masks`` on a small network: its lines, its file, and that it finds a wrong mask."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.support.bars import bar, in_turn
from benchmarks.support.workload import Setup, Workload, require_right_masks

ROOT = Path(__file__).parents[2]


def test_the_bars_are_printed_and_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.masks", "--quick", "--json", str(tmp_path / "bars.json"), "--only"]
    done = subprocess.run(
        [*command, "S1", "S3", "breakdown", "methods", "R1"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^S1 cifar_resnet20 +[\d.]+ \[[\d.]+–[\d.]+\] must be ≤ 1\.25, aim 1\.10, limit 1\.006",
        done.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^update rigl = rigl_itop cifar_resnet20 +layer \d+, global \d+", done.stdout, re.MULTILINE)
    written = json.loads((tmp_path / "bars.json").read_text())
    assert {"S1 cifar_resnet20", "S3 layer cifar_resnet20", "S3 global cifar_resnet20", "R1", "R1 parts"} <= set(
        written
    )
    assert written["R1"]["low"] <= written["R1"]["value"] <= written["R1"]["high"]
    assert written["R1"]["bounds"]["must"] == "≤ 1.03"


def test_a_bar_is_the_median_over_runs_and_the_quartiles_over_rounds() -> None:
    runs = [
        [(2.0, 1.0), (4.0, 1.0), (3.0, 1.0)],
        [(10.0, 2.0), (10.0, 2.0), (10.0, 2.0)],
        [(8.0, 2.0), (8.0, 2.0), (2.0, 2.0)],
    ]
    measured = bar("X", runs)  # medians 3, 5, 4; all ratios: 1 2 3 4 4 4 5 5 5
    assert (measured.runs, measured.value, measured.low, measured.high) == ((3, 5, 4), 4, 2.5, 5)


def test_the_first_round_is_not_counted_and_the_legs_change_places() -> None:
    called: list[str] = []
    run = in_turn(lambda: called.append("a"), lambda: called.append("b"), rounds=2, prepare=lambda: called.append("-"))
    assert "".join(called) == "-ab-ba-ab"
    assert len(run) == 2


def wrong_update(setup: Setup, *, is_exact: bool) -> Callable[[], None]:
    """Return an update that leaves one wrong bit in the first mask, or two with an exact count."""
    update = setup.update

    def wrong() -> None:
        update()
        mask = next(iter(setup.sparsifier.masks.values())).view(-1)
        flipped = torch.stack([mask.nonzero()[0, 0], (~mask).nonzero()[0, 0]])
        mask[flipped if is_exact else flipped[:1]] ^= True

    return wrong


@pytest.mark.parametrize(("method", "scope"), [("rigl", "layer"), ("rigl", "global"), ("set_itop", "layer")])
def test_a_wrong_mask_is_noticed(method: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(Workload.named("cifar_resnet8"), method, scope)
    require_right_masks(setup)
    monkeypatch.setattr(setup, "update", wrong_update(setup, is_exact=method == "rigl"))
    with pytest.raises(AssertionError, match=r"mask bits are not as|active weights, not"):
        require_right_masks(setup)

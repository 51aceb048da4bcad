"""Short versions of the campaigns of bad inputs and of random damage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.campaigns import fuzz
from tests.campaigns.bad_configurations import SHAPES, UNWORKABLE
from tests.campaigns.bad_inputs import CASES, meet
from tests.campaigns.bad_parts import LOAD_TORCH
from tests.campaigns.bad_tracking import EACH_REFUSAL
from tests.campaigns.cases import make_good


def test_there_are_408_bad_inputs() -> None:
    assert Counter(case.kind for case in CASES) == {
        "configuration": 152,
        "beton": 60,
        "ticket": 51,
        "image": 42,
        "checkpoint": 21,
        "sweep": 22,
        "run": 7,
        "tracking": 16,
        "verification": 13,
        "part": 24,
    }
    assert len({(case.kind, case.name) for case in CASES}) == 408


def test_every_thirteenth_bad_input_and_all_that_are_unworkable_are_one_line_in_seconds(tmp_path: Path) -> None:
    good = make_good(tmp_path / "good")
    every_time = [*EACH_REFUSAL, *UNWORKABLE]
    # 3 s each; test_train_cli.py, test_own_parts.py, test_start.py and test_foreign.py try them
    load_torch = {" ".join(texts) for texts, *_ in SHAPES} | LOAD_TORCH
    cases = [*[case for case in CASES if case not in every_time and case.name not in load_torch][::13], *every_time]
    outcomes = [meet(case, good, tmp_path / str(number), max_seconds=30) for number, case in enumerate(cases)]
    assert [f"{outcome.case.name}: {outcome.problem}: {outcome.line}" for outcome in outcomes if outcome.problem] == []
    assert len(outcomes) == 29 + 7 + 16
    assert max(outcome.processor_seconds for outcome in outcomes) < 3  # on a busy machine the clock says little


@pytest.mark.parametrize(("target", "count"), [("ticket", 2000), ("config", 100), ("beton", 150), ("checkpoint", 400)])
def test_random_damage_is_refused_or_harmless(target: str, count: int, tmp_path: Path) -> None:
    ends = fuzz.run(target, count=count, seed=1, folder=tmp_path)
    assert sum(ends.values()) == count
    assert ends[fuzz.REFUSED] > 0.5 * count and ends[fuzz.SAME] + ends[fuzz.VALID] > 0.01 * count

"""A short version of ``python -m tests.campaigns.resume``; test_main_job and test_faults kill runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.resume import upper_bound
from tests.support.ranks import RankServer

POINTS = 20


def test_a_run_stopped_at_twenty_random_steps_has_the_same_bits_at_each(
    server: RankServer, data: Path, tmp_path: Path
) -> None:
    sample = {
        "call": "tests.campaigns.resume:in_this_fork",
        "data": str(data),
        "folder": str(tmp_path),
        "points": POINTS,
    }
    job = server.start(
        [], ranks=1, log=tmp_path / "log", inject={**sample, "case": "EDST, stage 1, best of the average"}
    )
    assert job.wait() == [0], job.text[-4000:]
    assert f"{POINTS}/{POINTS} identical" in job.text


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000))  # 0.0030, the rule of three
    assert upper_bound(0, 100) == pytest.approx(0.0295, abs=1e-4)
    assert upper_bound(1, 10) == pytest.approx(0.3942, abs=1e-4)  # as tabulated
    assert upper_bound(5, 5) == 1

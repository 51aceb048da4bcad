"""The progress lines of a log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from pipeline.terminal import progress


def test_a_log_has_count_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([10.0, 29.0, 31.0, 60.0, 100.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    report = progress._log_lines("writing train.beton", "images", 0.0, says_end=True)
    with caplog.at_level(logging.INFO):
        for done in (100, 290, 310, 590, 1000):
            report(done, 1000)
    assert caplog.messages == [  # one line in 30 s, and the last
        "writing train.beton: 310 of 1000 images, 10/s, 1:09 left",
        "writing train.beton: 1000 of 1000 images, 10/s",
    ]

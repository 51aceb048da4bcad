"""Whatever answers at MLflow's address: training continues, with one warning and all metrics on disk."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import pytest

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ServiceError
from pipeline.tracking import open_tracker
from tests.support.hostile_server import ANSWERS, hostile_server

SECRET = "hunter2secret"


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import mlflow.tracking  # noqa: F401 - seconds that belong to no test's time


def peak_mib() -> int:
    """Return the peak memory of this process since ``5`` was written to its clear_refs."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


@pytest.mark.parametrize("answer", ANSWERS)
def test_training_goes_on(
    answer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    with hostile_server(answer) as address:
        config = TrackingConfig(backend="mlflow", experiment="unit", uri=f"http://me:{SECRET}@{address}")
        started = time.monotonic()
        tracker = open_tracker(config, output_dir=tmp_path, run_name="demo")
        for step in range(100):
            tracker.log_metrics({"train/loss": 1.0}, step=step)
        tracker.close()
        assert time.monotonic() - started < 10
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == list(range(100))
    said = [record.getMessage() for record in caplog.records]
    assert sum("is not accepting records" in text for text in said) == 1, said
    assert "102 records have not reached MLflow" in said[-1]  # the run, 100 steps and the end
    assert all(len(text) < 1000 and text.isprintable() for text in said), said
    assert SECRET not in "".join([*said, *capsys.readouterr()]) + "".join(
        path.read_text() for path in tmp_path.iterdir()
    )
    assert peak_mib() - before < 200


def test_where_a_server_is_required_it_is_one_line(tmp_path: Path) -> None:
    with (
        hostile_server("a login page") as address,
        pytest.raises(ServiceError, match="is not accepting records") as error,
    ):
        config = TrackingConfig(backend="mlflow", experiment="unit", uri=f"http://me:{SECRET}@{address}", required=True)
        open_tracker(config, output_dir=tmp_path, run_name="demo")
    assert SECRET not in str(error.value) and "\n" not in str(error.value)

"""Evaluation during training changes no bit of it, however often it runs and wherever it is stopped."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.campaigns.small_runs import STEPS, outcome_of
from tests.end_to_end.fault_runs import Runs, assert_sound, errors
from tests.end_to_end.test_preemption import SECONDS_TO_SAFE

PHASE_ENDS = (22, 30, 38)


def measured(output: Path) -> dict[int, dict[str, float]]:
    """Return the last record of ``val/*`` of every step of the run, counted from 1."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"] + 1: record["metrics"] for record in records if "val/top1" in record.get("metrics", {})}


@pytest.mark.parametrize(("engine", "more"), [("torch", "train.precision=bf16"), ("deepspeed", "train.zero_stage=1")])
def test_a_run_that_is_evaluated_killed_and_stopped_has_the_bits_of_one_that_is_not(
    runs: Runs, engine: str, more: str
) -> None:
    chosen = [f"train.engine={engine}", more]
    whole = runs.start(*chosen)
    assert whole.wait() == [0, 0], whole.text[-4000:]
    expected = outcome_of(runs.output)
    assert not measured(runs.output)  # evaluation.every=never
    runs.output = runs.folder / "evaluated"

    every_epoch = [*chosen, "evaluation.every=1 epoch"]
    where = "pipeline.evaluation.predict:Networks.__call__"  # once a batch, twice an evaluation
    killed = runs.start(*every_epoch, call="in_function", on_rank=1, function=where, number=4)
    assert killed.wait()[1] == -signal.SIGKILL, killed.text[-4000:]
    assert measured(runs.output).keys() == {PHASE_ENDS[0]} and not runs.has(PHASE_ENDS[1])

    every_step = [*chosen, "evaluation.every=1 step"]
    stopped = runs.start(*every_step, resume="auto", call="slow_evaluation", seconds=0.5)
    stopped.wait_for(lambda: "evaluating slowly" in stopped.text)
    started = time.monotonic()
    stopped.kill(signal.SIGTERM, ranks=[1])
    assert stopped.wait() == [75, 75], stopped.text[-4000:]
    assert time.monotonic() - started < SECONDS_TO_SAFE
    assert "was left out: the run was asked to stop" in stopped.text and not errors(stopped)
    assert_sound(runs.output)

    part = ["evaluation.every_images=100"] if engine == "torch" else []
    finished = runs.start(*every_step, *part, resume="auto")
    assert finished.wait() == [0, 0], finished.text[-4000:]
    assert outcome_of(runs.output) == expected
    found = measured(runs.output)
    assert found.keys() >= {*range(PHASE_ENDS[1] + 1, STEPS + 1)} and all(step in found for step in PHASE_ENDS[::2])
    assert f"epoch {STEPS / 31:.4g} of {STEPS / 31:.4g}: top-1 {100 * found[STEPS]['val/top1']:.2f}%" in finished.text
    if part:
        assert 100 * found[STEPS]["val/top1"] == pytest.approx(round(100 * found[STEPS]["val/top1"]))  # of 100 images
        return
    for row, step in zip(expected["report"], PHASE_ENDS, strict=False):  # the tickets
        if step in found:
            assert found[step]["val/top1"] == row["top1"] and found[step]["val/top5"] == row["top5"]
            assert found[step]["val/nll"] == pytest.approx(row["nll"], rel=1e-12)
            assert found[step]["time/evaluation_seconds"] > 0

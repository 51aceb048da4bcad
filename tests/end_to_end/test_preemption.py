"""F3: a run that is asked to stop, in any way, saves, exits with 75 and can be continued exactly."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.campaigns.small_runs import outcome_of
from tests.end_to_end.fault_runs import Runs, assert_sound, errors

SECONDS_TO_SAFE = 10.0  # with two ranks on two cores that others use too; tests.campaigns.resume prints what it takes


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1]), (signal.SIGINT, [0, 1])]
)
def test_f3_all_ranks_agree_whoever_is_asked(runs: Runs, number: signal.Signals, ranks: list[int]) -> None:
    job = runs.start()
    job.wait_for(lambda: runs.has(10))
    started = time.monotonic()
    job.kill(number, ranks=ranks)
    assert job.wait() == [75, 75], job.text
    assert time.monotonic() - started < SECONDS_TO_SAFE
    told = re.findall(
        r"^STOPPED\[75\] rank=0 step=(\d+) stopped as asked: checkpoint saved after step (\d+); "
        r"resume with: .* --resume auto$",
        job.text,
        re.MULTILINE,
    )
    assert len(told) == 1 and not errors(job)
    assert runs.has(int(told[0][1]))
    assert_sound(runs.output)


def test_f3_a_second_ctrl_c_ends_at_once(runs: Runs) -> None:
    job = runs.start(ranks=1, call="fail_in", on_rank=0, step=-1, what="slow", seconds=2.0)
    job.wait_for(
        (runs.output / "metrics.jsonl").exists
    )  # the signal handlers are installed by now, and no step is done yet
    started = time.monotonic()
    job.kill(signal.SIGINT)
    time.sleep(0.2)
    assert not job.is_over
    job.kill(signal.SIGINT)
    assert job.wait() == [130], job.text
    assert time.monotonic() - started < 2
    assert not errors(job)


def test_f3_a_stop_in_the_evaluation_needs_no_saving(runs: Runs) -> None:
    job = runs.start(call="slow_evaluation", seconds=0.5)
    job.wait_for(lambda: runs.has(38) and "evaluating slowly" in job.text)
    started = time.monotonic()
    job.kill(signal.SIGTERM)
    assert job.wait() == [75, 75], job.text
    assert time.monotonic() - started < SECONDS_TO_SAFE
    assert (
        "stopped as asked: during the evaluation, which starts again when the run is resumed; training is done"
        in job.text
    )
    assert not (runs.output / "report").exists()
    again = runs.start(resume="auto")
    assert again.wait() == [0, 0], again.text
    assert outcome_of(runs.output)["report"]

"""What a run shows on a terminal, and that nothing which happens to its output ends it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

from torch import Tensor

from tests.campaigns.small_runs import arguments
from tests.end_to_end.fault_runs import SUP_TICKETS, Runs
from tests.support.terminal import Terminal, screen, width

EVALUATES = "evaluation.every=1 epochs"
TORCH = "train.engine=torch"  # the quickest


def in_ascii(rank: int) -> None:
    """Give the run a terminal that is not UTF-8."""
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="ascii", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="ascii", closefd=False)  # type: ignore[misc]  # noqa: SIM115


def on_a_full_disk(rank: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_full_disk_for_the_log_does_not_end_a_run(runs: Runs) -> None:
    job = runs.start(TORCH, ranks=1, call=f"{__name__}:on_a_full_disk")
    assert job.wait() == [0], job.text[-4000:]
    assert (runs.output / "report" / "report.html").exists()
    lost = "warning: lines of the log are missing: No space left on device; the files of the run are complete"
    assert job.text.strip() == lost


def test_a_terminal_has_one_live_line_and_a_log_above_it(runs: Runs) -> None:
    """Of 80 columns and in ASCII, for a run of three phases that is evaluated after its epoch."""
    with Terminal.opened(columns=80) as terminal:
        argv = arguments(runs.data, runs.output, *SUP_TICKETS, TORCH, EVALUATES)
        inject = {"call": f"{__name__}:in_ascii"}
        job = runs.server.start(argv, ranks=1, log=terminal.path, inject=inject, environ={"TERM": "xterm"})
        terminal.read_until(lambda: job.is_over, seconds=120)
        text = terminal.content.decode("ascii")
        assert job.wait() == [0], text[-4000:]
    drawn = re.findall(r"\r\x1b\[K([^\r\n]*)(?=\r\x1b)", text)
    assert max(sum(map(width, line)) for line in drawn) < 80
    steps = [line for line in drawn if re.match(r"(exploration|refinement-[12])  (epoch \S+  )?step \d+/38", line)]
    assert len(steps) >= 3 and any(re.search(r"loss \d.*  run 0:\d\d left$", line) for line in steps)
    assert any(re.search(r"  val \d+\.\d%", line) for line in steps)
    assert any(line.startswith("evaluating: ") for line in drawn), "a bar"
    rows = screen(terminal.content, columns=10_000)  # what was printed, without wraps
    assert not [row for row in rows if " step " in row and not re.search(r"\d\d:\d\d:\d\d ", row)], (
        "a line was left over"
    )
    assert [row[9:28] for row in rows if "of 1.226: top-1" in row][:1] == ["epoch 0.7097 of 1.2"]
    assert [row.split()[1:3] for row in rows if " end of " in row] == [["ticket", str(index)] for index in range(3)]
    assert any("train x  test x" in row for row in rows), "the table"
    assert "Traceback" not in text and "Logging error" not in text


def test_elsewhere_there_is_a_line_for_each_interval(runs: Runs) -> None:
    job = runs.start(EVALUATES, ranks=2, resume="none")
    assert job.wait() == [0, 0], job.text[-4000:]
    assert "\r" not in job.text and "\x1b" not in job.text
    lines = re.findall(r"^\d\d:\d\d:\d\d (\S+)  epoch \S+  step (\d+)/38  loss .* left$", job.text, re.MULTILINE)
    assert lines == [
        ("exploration", "10"),
        ("exploration", "20"),
    ]  # the phases end after 22, 30 and 38, an epoch after 31
    evaluated = r"^\d\d:\d\d:\d\d epoch \S+ of 1.226: top-1 .* s\); (.*?)[\d:]+ left$"
    beside = re.findall(evaluated, job.text, re.MULTILINE)  # after steps 22, 30, 31 and 38
    has_loss = [bool(re.fullmatch(r"training loss \d\.\d+, \d+ images/s, ", text)) for text in beside]
    assert has_loss == [True, True, False, True] and not beside[2], "no window ends between steps 30 and 31"


def random_labels(rank: int) -> None:
    """Give every image the label of another one; accuracy is judged after 30 steps, so that the run is short."""
    from pipeline.data.loaders import TrainLoader
    from pipeline.training import divergence

    divergence.CHANCE_STEPS = 30, 30  # type: ignore[assignment]

    as_they_are = TrainLoader.steps

    def steps(self: TrainLoader, start: int, stop: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for step, (images, labels) in as_they_are(self, start, stop):
            yield step, (images, labels.roll(1))

    TrainLoader.steps = steps  # type: ignore[method-assign]


def test_a_run_that_learns_nothing_says_once_what_to_look_at(runs: Runs) -> None:
    long = [
        "plan.timetable=itop",
        "plan.num_refinements=0",
        "plan.refinement=null",
        "plan.exploration.length=40 steps",
    ]
    argv = arguments(
        runs.data,
        runs.output,
        *long,
        "tracking.log_every_steps=5",
        "plan.exploration.update_interval=20 steps",
        TORCH,
        every=1000,
    )
    job = runs.server.start(argv, ranks=1, log=runs.folder / "log", inject={"call": f"{__name__}:random_labels"})
    assert job.wait() == [0], job.text[-4000:]
    (told,) = re.findall(r"warning: (top-1 on training images is .*)", job.text)
    assert re.fullmatch(
        r"top-1 on training images is \d+\.\d\d% over the last 30 steps, as by guessing one of 10 classes: nothing "
        r"is learnt; look at the labels, at data.mean and data.std, and at the learning rate",
        told,
    )

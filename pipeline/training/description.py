"""What a tracker records about a run besides its numbers: description, tags, source, user and data sets."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.datasets.sets import DataSets
from pipeline.evaluation.table import main_cells
from pipeline.numbers import quantity
from pipeline.plan import Plan, describe_plan
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:  # torch
    from pipeline.evaluation.report import Report

# The names of MLflow for what its pages show in a place of their own.
NOTE, USER = "mlflow.note.content", "mlflow.user"
SOURCE_NAME, SOURCE_TYPE, COMMIT = "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit"
MAX_NOTE_CHARACTERS = 8000  # MLflow's limit for a tag
GIT_SECONDS = 5.0  # most time that asking git may take, on a slow file system


def describe_run(tracker: Tracker, config: Config, plan: Plan, sets: DataSets, *, folder: Path) -> None:
    """Record in the tracker who trains what, on which data, with which code."""
    sparsity = config.sparsity
    facts = {"method": sparsity.method, "model": config.model.name, "density": f"{sparsity.density:g}"}
    facts |= {"timetable": config.plan.timetable, "data": data_name(config.data.train), "seed": str(config.seed)}
    source = {SOURCE_NAME: sys.argv[0] or "python", SOURCE_TYPE: "LOCAL", USER: user_name()}
    if commit := git_commit(Path(__file__).resolve().parents[2]):
        source[COMMIT] = commit
    tracker.set_tags(facts | source | {NOTE: note(config, plan, folder=folder)})
    used = {"training": sets.train, "evaluation": sets.val, "held-out": sets.held_out}
    for context, info in used.items():
        if info is not None:
            tracker.log_input(
                data_name(info.path),
                digest=info.digest,
                context=context,
                source=str(info.path),
                profile={"num_rows": info.num_samples, "num_classes": info.num_classes, "sha256": info.digest},
            )


def note(config: Config, plan: Plan, *, folder: Path, report: Report | None = None) -> str:
    """Return the run's description in Markdown: what is trained, its result so far, how to resume or open it."""
    sparsity, epochs = config.sparsity, plan.num_steps / plan.steps_per_epoch
    num_tickets = sum(phase.ticket_index is not None for phase in plan.phases)
    parts = [
        f"**{config.model.name}** trained sparse on **{data_name(config.data.train)}**: method `{sparsity.method}`, "
        f"density {sparsity.density:g}, timetable `{config.plan.timetable}`, {epochs:.4g} epochs, "
        f"{quantity(num_tickets, 'ticket')}, seed {config.seed}.",
        _result(report) if report else "The result stands here once training has ended.",
        f"To open this page: `python -m pipeline.tracking open {folder.resolve()}`. "
        "To continue the run after a stop: its command again, with `--resume auto`.",
    ]
    with_plan = "\n\n".join([*parts, f"```\n{describe_plan(plan)}\n```"])
    return with_plan if len(with_plan) <= MAX_NOTE_CHARACTERS else "\n\n".join(parts)[:MAX_NOTE_CHARACTERS]


def data_name(path: str | Path) -> str:
    """Return a short name of a data set: ``imagenet/train`` for ``/data/imagenet/train.beton``."""
    path = Path(path)
    return "/".join([*path.resolve().parts[-2:-1], path.stem if path.suffix == ".beton" else path.name])


def user_name() -> str:
    """Return who runs this process: a name, or the number where the system knows no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user often has no entry in /etc/passwd
        return str(os.getuid())


def git_commit(folder: Path) -> str:
    """Return the commit that is checked out in ``folder``; empty if it is not a git checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, not a checkout, or a checkout of another user
        return ""
    return answer.stdout.strip()


def _result(report: Report) -> str:
    """Return what the page shows of the result without a click, and the table."""
    from pipeline.evaluation.report import final_metrics  # torch: not at the top, for a sweep needs none

    accuracies = {key: value for key, value in final_metrics(report).items() if key.endswith("_top1")}
    shown = [f"{_name(key)} **{100 * value:.2f}%**" for key, value in accuracies.items()]
    return f"Top-1: {', '.join(shown)}.\n\n{_markdown_table(main_cells(report))}"


def _name(key: str) -> str:
    """Return ``last ticket`` for ``eval/last_ticket_top1``."""
    return key.removeprefix("eval/").removesuffix("_top1").replace("_", " ")


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))

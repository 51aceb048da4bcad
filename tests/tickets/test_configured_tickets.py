"""How the configuration sets retention of tickets, also on resume, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.checkpoints import Resumed
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, IntegrityError
from pipeline.plan import Plan, build_plan
from pipeline.tickets.format import Ticket
from pipeline.tickets.store import TicketStore
from pipeline.training import assembly
from pipeline.training.run_folder import RunFolder

# Tickets 0 … 4, after 92, 94, 96, 98 and 100 epochs of one step.
NAME = "imagenet_r50_s90"


def opened(folder: Path, *overrides: str) -> tuple[TicketStore, Plan]:
    config = load_config(NAME, ["data.train=t", "data.val=v", f"output_dir={folder}", *overrides])
    plan = build_plan(config, steps_per_epoch=1)
    return assembly.open_tickets(config, plan, RunFolder(folder, "run-1")), plan


def test_all_tickets_are_kept_by_default_and_each_must_be_there(
    make_ticket: Callable[..., Ticket], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tickets, plan = opened(tmp_path)
    for index in range(4):
        tickets.save(make_ticket(index))
    assembly.require_tickets([tickets], plan, Resumed(98, ""))
    assert not caplog.text
    assembly.require_tickets([tickets], plan, Resumed(0, ""))
    assert "no checkpoint found: the run starts again at step 0, although tickets [0, 1, 2, 3] exist" in caplog.text
    (tmp_path / "tickets" / "ticket-001.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"tickets \[1\] are missing or damaged, expected before step 98"):
        assembly.require_tickets([tickets], plan, Resumed(98, ""))


@pytest.mark.parametrize(("overrides", "kept"), [((), {0, 2, 3}), (("tickets.keep_first=false",), {2, 3})])
def test_a_resumed_run_does_not_ask_for_retired_tickets(
    overrides: tuple[str, ...], kept: set[int], make_ticket: Callable[..., Ticket], tmp_path: Path
) -> None:
    tickets, plan = opened(tmp_path, "tickets.keep=2", *overrides)
    for index in range(4):
        tickets.save(make_ticket(index))
    assert {ref.index for ref in tickets.list()} == kept
    for step in (98, 96, 92, 0):  # also from an older checkpoint, when what was there then has been retired since
        assembly.require_tickets([tickets], plan, Resumed(step, ""))
    (tmp_path / "tickets" / "ticket-002.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"tickets \[2\] are missing or damaged, expected before step 98"):
        assembly.require_tickets([tickets], plan, Resumed(98, ""))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "0, 1, 2, 3, 4"),
        (("tickets.keep=2",), "0, 3, 4"),
        (("tickets.keep=2", "evaluation.with_exploration=false"), "3, 4"),
    ],
)
def test_weights_that_will_not_fit_are_refused_before_training(
    overrides: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"expected .* weights, got 6; do: .* tickets {expected}, or none"):
        opened(tmp_path, "evaluation.ticket_weights=[1, 1, 1, 1, 1, 1]", *overrides)
    weights: Any = [1.0] * len(expected.split(", "))
    opened(tmp_path, f"evaluation.ticket_weights={weights}", *overrides)

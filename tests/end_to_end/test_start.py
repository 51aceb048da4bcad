"""Runs that start from a ticket or from a state_dict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.tickets.format import Ticket, decode
from pipeline.tickets.store import TicketStore
from pipeline.tickets.verify import read_verified
from tests.campaigns.small_runs import ONE_PHASE, arguments, require_codes
from tests.support.ranks import Job, RankServer

SHORT = [*ONE_PHASE, "plan.exploration.length=12 steps", "train.engine=torch"]
STATIC = [*SHORT, "sparsity.method=static", "plan.timetable=static", "plan.exploration.update_interval=null"]
STILL = [*STATIC, "plan.exploration.lr.schedule=constant", "plan.exploration.lr.value=0"]  # no weight changes


class Runs:
    def __init__(self, server: RankServer, data: Path, folder: Path) -> None:
        self.server, self.data, self.folder = server, data, folder

    def start(self, name: str, *more: str, resume: str = "none") -> Job:
        argv = arguments(self.data, self.folder / name, *more, resume=resume)
        return self.server.start(argv, ranks=2, log=self.folder / f"{name}.log")

    def done(self, name: str, *more: str) -> Ticket:
        require_codes(self.start(name, *more), [0, 0])
        return decode(TicketStore(self.folder / name).last())


@pytest.fixture(scope="module")
def runs(server: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(server, data, tmp_path_factory.mktemp("starts"))


@pytest.fixture(scope="module")
def first(runs: Runs) -> Ticket:
    return runs.done("first", *SHORT)


def weights_of(ticket: Ticket) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in ticket.state.items() if name not in ticket.buffers}


def test_a_static_run_keeps_the_masks_of_its_ticket_and_trains_the_weights(runs: Runs, first: Ticket) -> None:
    tuned = runs.done("static", *STATIC, f"model.from_ticket={runs.folder / 'first'}")
    assert all(torch.equal(tuned.masks[name], mask) for name, mask in first.masks.items())
    assert any(not torch.equal(tensor, first.state[name]) for name, tensor in weights_of(tuned).items())
    run = first.provenance.parent_run
    expected = {"from": "ticket", "sha256": first.content_digest, "name": f"ticket 0 of {run}"}
    assert (tuned.provenance.origin, first.provenance.origin) == (expected, {})
    assert (tuned.provenance.r_s, tuned.density) == (tuned.density, first.density)
    path = TicketStore(runs.folder / "static").last()
    assert read_verified(path).provenance.origin == expected
    assert f"from_ticket: {runs.folder / 'first'}" in (runs.folder / "static" / "config.yaml").read_text()
    # at a learning rate of 0 the weights are those of the ticket, to the bit
    still = runs.done("still", *STILL, f"model.from_ticket={runs.folder / 'first'}")
    assert all(torch.equal(tensor, first.state[name]) for name, tensor in weights_of(still).items())


def test_rigl_moves_the_masks_and_a_resumed_run_ends_with_the_same_bits(runs: Runs, first: Ticket) -> None:
    begin = [*SHORT, f"model.from_ticket={runs.folder}/first/tickets/ticket-000.safetensors"]
    moved = runs.done("rigl", *begin)
    assert any(not torch.equal(moved.masks[name], mask) for name, mask in first.masks.items())
    assert {n: int(m.sum()) for n, m in moved.masks.items()} == {n: int(m.sum()) for n, m in first.masks.items()}
    require_codes(runs.start("again", *begin, "--stop-after", "5"), [75, 75])
    require_codes(runs.start("again", *begin, resume="auto"), [0, 0])
    again = decode(TicketStore(runs.folder / "again").last())
    assert all(torch.equal(again.state[name], tensor) for name, tensor in moved.state.items())
    assert all(torch.equal(again.masks[name], mask) for name, mask in moved.masks.items())
    assert again.provenance.origin == moved.provenance.origin


def test_a_run_starts_from_a_state_dict_with_its_largest_weights(runs: Runs, first: Ticket) -> None:
    """They are those that the ticket has, because all others are 0."""
    path = runs.folder / "dense.pt"
    torch.save({"model": {f"module.{name}": tensor for name, tensor in first.state.items()}, "epoch": 3}, path)
    tuned = runs.done("from-state", *STILL, f"model.from_state={path}")
    assert all(torch.equal(tensor, first.state[name]) for name, tensor in weights_of(tuned).items())
    assert tuned.provenance.origin["from"] == "state" and tuned.provenance.origin["name"] == "dense.pt"

"""What a run keeps besides its network: a moving average of the weights, and the best state of a phase."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.chain import END, TICKET
from pipeline.tickets.format import decode, pack_sparse
from pipeline.tickets.store import TicketRef, TicketStore
from tests.campaigns.small_runs import CASES, KEPT, STEPS, arguments, outcome_of, require_codes
from tests.support.ranks import Job, RankServer

# The accuracy falls after step 12 of the first phase, which has 22: the learning rate becomes 40 times as high.
FALLS = [
    *("plan.exploration.lr={schedule: step, value: 0.2, milestones: [12 steps], factor: 40}", "evaluation.batch=50"),
    *(*CASES["Sup-tickets, stage 0"], "evaluation.every_images=50"),
]
EVALUATED = [3, 6, 9, 12, 15, 18, 21, 22, 24, 27, 30, 33, 36, 38]  # every 3 steps, and at the ends of phases


class Runs:
    """Runs on two ranks, in folders of one folder."""

    def __init__(self, server: RankServer, data: Path, folder: Path) -> None:
        self.server, self.data, self.folder = server, data, folder

    def start(self, name: str, *more: str, resume: str = "none") -> Job:
        argv = arguments(self.data, self.folder / name, *FALLS, *more, resume=resume)
        return self.server.start(argv, ranks=2, log=self.folder / f"{name}.log")


@pytest.fixture(scope="module")
def folder(server: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``, ``kept`` and, in another engine and killed in between, ``killed``."""
    folder = tmp_path_factory.mktemp("selection")
    runs = Runs(server, data, folder)
    require_codes(runs.start("plain"), [0, 0])
    require_codes(runs.start("kept", *KEPT), [0, 0])
    job = runs.start("killed", *KEPT, "train.engine=torch")
    job.wait_for((folder / "killed" / "checkpoints" / "step-00000015" / "manifest.json").exists)
    job.kill(signal.SIGKILL)
    require_codes(job, [-signal.SIGKILL, -signal.SIGKILL])
    require_codes(runs.start("killed", *KEPT, "train.engine=torch", resume="auto"), [0, 0])
    return folder


def tickets_of(output: Path) -> list[TicketRef]:
    return TicketStore(output / "tickets").list()


def metrics_of(output: Path, name: str) -> dict[int, float]:
    """Return a metric by number of steps done."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"] + 1: record["metrics"][name] for record in records if name in record.get("metrics", {})}


def saved_at_the_end(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")


def test_tickets_of_the_average_hold_it_and_say_so(folder: Path, server: RankServer, data: Path) -> None:
    averaged = ["train.ema_decay=0.9", "tickets.weights=average"]
    require_codes(Runs(server, data, folder).start("averaged", *averaged), [0, 0])
    refs = tickets_of(folder / "averaged")
    assert [ref.provenance.extra["ema_decay"] for ref in refs] == [0.9] * 3
    assert "ema_decay" not in tickets_of(folder / "kept")[0].provenance.extra
    ticket = decode(refs[-1].path)
    weights = {name: tensor for name, tensor in ticket.state.items() if name not in ticket.buffers}
    saved, packed = saved_at_the_end(folder / "kept"), pack_sparse(weights, ticket.masks)
    assert all(torch.equal(tensor, saved[f"average/{name}"]) for name, tensor in packed.items())
    assert not all(torch.equal(tensor, saved[f"model/{name}"]) for name, tensor in packed.items())
    top1, of_average = (metrics_of(folder / "kept", f"val/{name}top1") for name in ("", "ema_"))
    assert list(top1) == list(of_average) == EVALUATED and top1 != of_average


def test_the_network_and_its_tickets_have_the_same_bits_whatever_is_kept_besides(folder: Path) -> None:
    plain, kept = outcome_of(folder / "plain"), outcome_of(folder / "kept")
    last = [name for name in kept["tickets"] if "/" not in name]
    assert sorted(last) == sorted(plain["tickets"]) and len(last) == 3
    assert {name: kept["tickets"][name] for name in last} == plain["tickets"]
    one, other = (saved_at_the_end(folder / name) for name in ("plain", "kept"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert {key.partition("/")[0] for key in other.keys() - one.keys()} == {"average"}
    names = {row["name"] for row in plain["report"]}
    assert [row for row in kept["report"] if row["name"] in names] == plain["report"]
    assert {row["name"] for row in kept["report"]} - names == {
        f"best-{what}"
        for what in ("ticket-0", "ticket-1", "ticket-2", "superposition-mean", "ensemble-2", "ensemble-3")
    }


def test_the_best_state_of_a_phase_is_the_first_with_the_highest_accuracy(folder: Path) -> None:
    top1 = metrics_of(folder / "kept", "val/held_out_top1")
    assert list(top1) == EVALUATED
    last, best = tickets_of(folder / "kept"), TicketStore(folder / "kept" / "tickets" / "best").list()
    assert [ref.provenance.step for ref in last] == [22, 30, 38]
    ends = [0, 22, 30, 38]
    expected = [max((step for step in top1 if a < step <= b), key=top1.__getitem__) for a, b in pairwise(ends)]
    assert [ref.provenance.step for ref in best] == expected
    assert [ref.provenance.extra["held_out_top1"] for ref in best] == [top1[step] for step in expected]
    assert expected[0] <= 12 and top1[22] < top1[expected[0]] - 0.1
    assert [ref.provenance.phase for ref in best] == [ref.provenance.phase for ref in last]
    assert {ref.provenance.parent_run for ref in best} == {ref.provenance.parent_run for ref in last}


def test_a_killed_run_of_another_engine_keeps_the_same_when_it_is_resumed(folder: Path) -> None:
    killed, kept = (outcome_of(folder / name) for name in ("killed", "kept"))
    for outcome in (killed, kept):  # the chain's digests of tickets cover the configuration, which names the engine
        outcome["chain"] = [record for record in outcome["chain"] if record[0] not in (TICKET, END)]
    assert killed == kept
    found = [metrics_of(folder / name, "val/held_out_top1") for name in ("killed", "kept")]
    assert found[0] == found[1]

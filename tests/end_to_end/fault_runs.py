"""Runs with injected faults, and what must hold afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.verify import find_damage
from pipeline.tickets.store import TicketStore
from tests.campaigns.small_runs import CASES, arguments
from tests.support.ranks import Job, RankServer

SUP_TICKETS = CASES["Sup-tickets, stage 0"]


class Runs:
    """Starts the runs of one test in one folder."""

    def __init__(self, server: RankServer, data: Path, folder: Path) -> None:
        self.server, self.data, self.folder = server, data, folder
        self.output = folder / "run"
        self.num_started = 0

    def start(self, *more: str, resume: str = "none", ranks: int = 2, call: str = "", **inject: Any) -> Job:
        self.num_started += 1
        function = call if ":" in call else f"tests.support.injections:{call}"
        injected = {"call": function, **inject} if call else None
        argv = arguments(self.data, self.output, *SUP_TICKETS, *more, resume=resume)
        return self.server.start(argv, ranks=ranks, log=self.folder / f"{self.num_started}.log", inject=injected)

    def has(self, step: int) -> bool:
        return (self.output / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()


def errors(job: Job) -> list[str]:
    return [line for line in job.text.splitlines() if line.startswith("ERROR[")]


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def assert_sound(output: Path, *, at_least: int = 1) -> None:
    """Assert that all committed files verify, and that no half-written file has a final name."""
    folders = sorted((output / "checkpoints").glob("step-*"))
    assert len(folders) >= at_least
    assert [find_damage(folder) for folder in folders] == [""] * len(folders)
    tickets = sorted((output / "tickets").glob("*.safetensors"))
    assert [ref.path for ref in TicketStore(output / "tickets").list()] == tickets


def assert_ends(job: Job, codes: Sequence[int], expected: str, *, within_seconds: float = 20) -> str:
    """Assert the exit codes by rank, and that there is one error line, which matches ``expected``."""
    started = time.monotonic()
    assert job.wait() == list(codes), job.text[-4000:]
    assert time.monotonic() - started < within_seconds
    told = errors(job)
    assert len(told) == 1, job.text[-4000:]
    assert re.search(expected, told[0]), told[0]
    assert "Traceback" not in job.text
    return told[0]

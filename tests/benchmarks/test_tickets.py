"""``python -m benchmarks.tickets`` on a small network: lines, file, and that it finds a wrong ticket."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tickets import require_exact, sparse_ticket
from pipeline import models
from pipeline.tickets.format import encode

ROOT = Path(__file__).parents[2]


def test_the_bars_are_printed_and_written(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.tickets",
        "--quick",
        "--only",
        "T1",
        "T2",
        "--json",
        str(tmp_path / "bars.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^T1 +[\d.]+ must be ≥ 7\.3", done.stdout, re.MULTILINE)
    assert re.search(r"^T2 load +[\d.]+ \[[\d.]+–[\d.]+\] must be ≤ 2\.0, aim 1, limit 0\.1", done.stdout, re.MULTILINE)
    assert {"T1", "T2 save", "T2 load"} == set(json.loads((tmp_path / "bars.json").read_text()))


def test_a_ticket_that_does_not_come_back_is_noticed(tmp_path: Path) -> None:
    ticket = sparse_ticket(models.build("cifar_resnet8", num_classes=10))
    (tmp_path / "t").write_bytes(encode(ticket))
    require_exact(tmp_path / "t", ticket)
    other = dict(ticket.state)
    name = next(iter(ticket.masks))
    other[name] = other[name] * 2
    with pytest.raises(AssertionError, match=re.escape(name)):
        require_exact(tmp_path / "t", dataclasses.replace(ticket, state=other))

"""``python -m benchmarks.gradients`` between two emulated hosts, and the cost model of scaling."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import gradient_bytes, ring_seconds, step
from tools.hosts import unsupported_reason

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(bool(unsupported_reason()), reason=unsupported_reason())
def test_bytes_are_counted_between_two_hosts(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gradients",
        "--quick",
        "--only",
        "C1",
        "--json",
        str(tmp_path / "bars.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^C1 resnet18 0\.1 +9\.\d+, with RigL every 100 steps 9\.\d+", done.stdout, re.MULTILINE)
    written = json.loads((tmp_path / "bars.json").read_text())
    assert 18 < written["C1 resnet18 0.05"]["value"] < 20 and 4.9 < written["C1 resnet18 0.2"]["value"] < 5


def test_the_model_of_cost_by_hand() -> None:
    assert gradient_bytes(1) == 4 * 25_557_032
    assert gradient_bytes(0.1) == pytest.approx(4 * (54_120 + 2_550_291.2))
    assert gradient_bytes(0.1, interval=2) == pytest.approx((gradient_bytes(0.1) + gradient_bytes(1)) / 2)
    assert ring_seconds(100, 2, 50) == 2  # each of two ranks sends the whole buffer once
    assert ring_seconds(100, 4, 50) == 3
    alone = step(8, 1.0, 1.0)
    assert alone.seconds == alone.compute == pytest.approx(256 / 3000)  # within a node the backward pass hides it
    slow = step(64, 1.0, 1.0)
    assert slow.seconds == pytest.approx(slow.compute / 3 + slow.averaging)

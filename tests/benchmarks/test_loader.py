"""``python -m benchmarks.loader`` on a few photographs, and measures of randomness on small orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.shuffle import measure

ROOT = Path(__file__).parents[2]


def test_pixel_differences_and_the_check_of_parts(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.loader",
        "--quick",
        "--only",
        "pixels",
        "--json",
        str(tmp_path / "bars.json"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bars.json").read_text())
    assert found["ours / OpenCV's area, shrunk"]["largest"] <= 1
    assert found["ours / torchvision's antialiased bilinear, shrunk"]["mean"] > 0.3  # its filter is wider


def test_measures_of_randomness() -> None:
    order, blocks = np.arange(8), np.arange(8) // 2
    found = measure([order, order[::-1].copy()], np.array([0, 0, 0, 0, 1, 1, 1, 1]), blocks, batch=4, cache=1)
    assert found.displacement == pytest.approx((7 + 5 + 3 + 1) * 2 / 8 / 8)
    assert found.same_class == pytest.approx(1 / (3 / 7))  # all pairs of a batch, of 3 in 7
    assert found.met_again == pytest.approx(1 / (3 / 7))
    assert found.read == 1.0
    assert measure([order.reshape(4, 2).T.reshape(-1)] * 2, np.zeros(8, int), blocks, batch=4, cache=1).read == 2.0

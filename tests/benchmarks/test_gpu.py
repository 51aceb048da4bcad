"""``python -m benchmarks.gpu``: its checks also run on a CPU; without a GPU it ends with a message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_it_runs_on_a_cpu_when_asked_to() -> None:
    done = benchmark("--quick", "--device", "cpu", "--only", "masks", "packing", "step")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "masks of 14 strategies are equal on cpu and cpu" in done.stdout
    assert "sparse / dense step" in done.stdout and "must be ≤ 1.02" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_message() -> None:
    done = benchmark()
    assert done.returncode == 1
    assert "no CUDA device found; --device cpu --quick tests that the code runs" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_of_the_gpu_are_those_of_the_cpu() -> None:
    done = benchmark("--only", "masks")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on cpu and cuda" in done.stdout

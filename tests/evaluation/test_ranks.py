"""Whatever the number of ranks, the numbers are those of one: real processes, gloo, different data on each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RANK_SCRIPT = Path(__file__).parent / "rank.py"


def start(world_size: int, folder: Path) -> list[subprocess.Popen[str]]:
    commands = [[sys.executable, RANK_SCRIPT, str(rank), str(world_size), folder] for rank in range(world_size)]
    return [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, publish: Callable[..., Any]
) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """For 1 and 2 ranks: what rank 0 found."""
    folder = tmp_path_factory.mktemp("ranks")
    publish(folder / "tickets", 3)
    finish(start(1, folder) + start(2, folder))
    return {n: (json.loads((folder / f"{n}.json").read_text()), load_file(folder / f"{n}.safetensors")) for n in (1, 2)}


def test_recalibration_does_not_depend_on_the_number_of_ranks(results: Any) -> None:
    (one, statistics), (two, others) = results[1], results[2]
    assert one["num_images"] == two["num_images"] == 22
    for name, value in statistics.items():
        if "tracked" in name:
            assert value == others[name] == 6  # micro-batches
        elif "running" in name:
            torch.testing.assert_close(value, others[name], rtol=1e-7, atol=0)  # float64 sums in another order


def test_predictions_are_those_of_one_rank_in_sample_order(results: Any, rank_module: Any) -> None:
    for _, tensors in results.values():
        assert torch.equal(tensors["labels"], rank_module.Images(0, 1).labels)
    torch.testing.assert_close(results[1][1]["probabilities"], results[2][1]["probabilities"], rtol=0, atol=1e-6)


def test_buffers_are_averaged_over_ranks(results: Any) -> None:
    assert results[1][0]["mean_of_ranks"] == 0.0
    assert results[2][0]["mean_of_ranks"] == (0 + 1) / 2


def test_the_report_is_that_of_one_rank(results: Any) -> None:
    one, two = results[1][0]["report"], results[2][0]["report"]
    assert [row["name"] for row in one["rows"]] == ["ticket-0", "ticket-1", "ticket-2", "superposition-mean", "ensemble-2", "ensemble-3"]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        for key, value in row.items():
            assert value == (other[key] if isinstance(value, str) else pytest.approx(other[key], rel=1e-5)), key
    assert one["kl"] == pytest.approx(two["kl"], rel=1e-5)


def test_ranks_with_different_tickets_stop(tmp_path: Path, publish: Callable[..., Any]) -> None:
    for rank, num_tickets in enumerate((2, 3)):
        (tmp_path / f"{rank}").mkdir()
        publish(tmp_path / f"{rank}" / "tickets", num_tickets)
        (tmp_path / f"{rank}" / "rendezvous-2").symlink_to(tmp_path / "rendezvous")
    commands = [[sys.executable, RANK_SCRIPT, str(rank), "2", tmp_path / str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all("IntegrityError: ticket lists differ between ranks" in error for error in errors), errors

"""Any number of ranks gives the numbers of one rank: real processes, gloo, different data on each."""

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

from pipeline.evaluation import metrics

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
    """The results of rank 0, for 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    publish(folder / "tickets", 3)
    finish(start(1, folder) + start(2, folder) + start(3, folder))
    return {
        n: (json.loads((folder / f"{n}.json").read_text()), load_file(folder / f"{n}.safetensors")) for n in (1, 2, 3)
    }


def test_recalibration_does_not_depend_on_the_number_of_ranks(results: Any) -> None:
    for ranks in (2, 3):
        (one, statistics), (more, others) = results[1], results[ranks]
        assert one["num_images"] == more["num_images"] == 22
        for name, value in statistics.items():
            if "tracked" in name:
                assert value == others[name] == 6  # micro-batches
            elif "running" in name:
                torch.testing.assert_close(value, others[name], rtol=1e-7, atol=0)  # float64 sums in another order


def test_predictions_are_those_of_one_rank_in_sample_order(results: Any, rank_module: Any) -> None:
    for _, tensors in results.values():
        assert torch.equal(tensors["labels"], rank_module.Images(0, 1).labels)
    for ranks in (2, 3):
        torch.testing.assert_close(
            results[1][1]["probabilities"], results[ranks][1]["probabilities"], rtol=0, atol=1e-6
        )


def test_scores_are_those_of_all_images_on_any_number_of_ranks(results: Any) -> None:
    for content, tensors in results.values():
        for found, probabilities in zip(content["scores"], tensors["probabilities"], strict=True):
            assert found["top1"] == metrics.top1(probabilities, tensors["labels"])
            assert found["top5"] == 1  # of three classes
            assert found["nll"] == pytest.approx(metrics.nll(probabilities, tensors["labels"]), rel=1e-12)
            assert found["num_not_finite"] == 0


def test_buffers_are_averaged_over_ranks(results: Any) -> None:
    assert results[1][0]["mean_of_ranks"] == 0.0
    assert results[2][0]["mean_of_ranks"] == (0 + 1) / 2
    assert results[3][0]["mean_of_ranks"] == (0 + 1 + 2) / 3


def test_the_report_is_that_of_one_rank(results: Any) -> None:
    one = results[1][0]["report"]
    assert [row["name"] for row in one["rows"]] == [
        "ticket-0",
        "ticket-1",
        "ticket-2",
        "superposition-mean",
        "ensemble-2",
        "ensemble-3",
    ]
    for ranks in (2, 3):
        more = results[ranks][0]["report"]
        for row, other in zip(one["rows"], more["rows"], strict=True):
            numbers, others = row.pop("more"), dict(other.pop("more"))
            assert row == {
                key: value if isinstance(value, str) else pytest.approx(value, rel=1e-5) for key, value in other.items()
            }
            assert numbers == pytest.approx(others, rel=1e-4)  # corruption, other classes, attacks, temperature
            row["more"] = numbers
        assert one["kl"] == pytest.approx(more["kl"], rel=1e-5)
        assert one["disagreements"] == more["disagreements"] and one["mask_overlaps"] == more["mask_overlaps"]


def test_what_is_chosen_is_what_one_rank_chooses(results: Any) -> None:
    rows = {ranks: content["chosen"]["rows"][3] for ranks, (content, _) in results.items()}
    assert rows[1]["name"] == "superposition-interpolation" and rows[1]["num_members"] > 1  # at least one was included
    for ranks in (2, 3):
        assert rows[1] == {
            key: value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-5)
            for key, value in rows[ranks].items()
        }


def test_ranks_with_different_tickets_stop(tmp_path: Path, publish: Callable[..., Any]) -> None:
    for rank, num_tickets in enumerate((2, 3)):
        (tmp_path / f"{rank}").mkdir()
        publish(tmp_path / f"{rank}" / "tickets", num_tickets)
        (tmp_path / f"{rank}" / "rendezvous-2").symlink_to(tmp_path / "rendezvous")
    commands = [[sys.executable, RANK_SCRIPT, str(rank), "2", tmp_path / str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all("IntegrityError: ticket lists differ between ranks" in error for error in errors), errors

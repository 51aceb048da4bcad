"""Ranks with different data have the same masks and weights.

Real processes write their state, and the tests compare it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_ranks

WORKER = Path(__file__).with_name("agreement_worker.py")
CASES = [f"{method} {scope}" for method in ("set", "rigl") for scope in ("layer", "global")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(WORKER, (2, [folder]), (1, [folder]), log=folder / "log")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_identical_masks_and_weights_after_every_update(results: dict[str, Any], case: str) -> None:
    first, second = (results[f"rank-{rank}-of-2"][f"torch {case}"] for rank in (0, 1))
    assert len(first) == 5
    assert first == second
    assert len({digest for digest, _ in first}) == 5  # the masks do change


@pytest.mark.parametrize("case", CASES)
def test_one_rank_with_the_concatenated_batch_has_the_same_masks(results: dict[str, Any], case: str) -> None:
    one, two = (results[name][f"float64 {case}"] for name in ("rank-0-of-1", "rank-0-of-2"))
    assert [digest for digest, _ in one] == [digest for digest, _ in two]
    assert len(one) == 5


def test_deepspeed_and_torch_train_the_same_network_bit_for_bit(results: dict[str, Any]) -> None:
    for rank in ("rank-0-of-2", "rank-1-of-2", "rank-0-of-1"):
        assert results[rank]["deepspeed rigl layer"] == results[rank]["torch rigl layer"]


def test_a_flipped_mask_bit_names_layer_and_rank_on_every_rank(results: dict[str, Any]) -> None:
    for rank in (0, 1):
        message = results[f"rank-{rank}-of-2"]["flipped bit"]
        assert (
            "masks differ between ranks after step 1: first in blocks.1.conv1.weight, ranks [1] against rank 0"
            in message
        )


def test_an_error_of_rank_0_is_raised_on_all_ranks_and_reported_by_one(results: dict[str, Any]) -> None:
    for rank in (0, 1):
        assert results[f"rank-{rank}-of-2"]["rank 0 fails"] == ["the disk is full; do: make room", rank == 1]
        assert results[f"rank-{rank}-of-2"]["text"] == "möglich"


def test_a_loss_that_is_not_finite_ends_all_ranks_and_its_own_rank_reports_it(results: dict[str, Any]) -> None:
    expected = {0: "loss 1.0 or gradient norm nan", 1: "loss nan or gradient norm nan"}
    for rank in (0, 1):
        what, is_reported_elsewhere = results[f"rank-{rank}-of-2"]["not finite"]
        assert what.startswith(expected[rank])
        assert is_reported_elsewhere == (rank == 0)


def test_loss_and_top1_are_means_over_the_steps_and_ranks_since_the_last_report(results: dict[str, Any]) -> None:
    # (1 + 2 + 3 + 4)/4 and (0.5 + 0 + 1 + 0.5)/4; then (5 + 6 + 7 + 8)/4 and (1 + 1 + 0 + 0.5)/4
    assert results["rank-0-of-2"]["means"] == [[2.5, 0.5], [6.5, 0.625]]
    assert results["rank-1-of-2"]["means"] == []  # rank 0 reports


def test_ranks_whose_hosts_have_other_data_or_another_configuration_do_not_begin(results: dict[str, Any]) -> None:
    odd = {"training set": "data.train", "validation set": "data.val", "seed": "the configuration"}
    for rank in (0, 1):
        found = results[f"rank-{rank}-of-2"]["other data"]
        assert found.pop("the same") == "opened"
        assert found.keys() == odd.keys()
        for name, (what, do, is_reported_elsewhere) in found.items():
            assert what == (
                "data sets or configurations differ between ranks after step 0: "
                f"first in {odd[name]}, ranks [1] against rank 0"
            )
            assert do.startswith("give every host the same command line, configuration file and data files")
            assert is_reported_elsewhere == (rank == 1)

"""Every method trains on Fashion-MNIST on several real processes, with the same masks and weights on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.sparse.strategy import METHODS
from tests.support.forked import run_ranks
from tests.support.packages import needs_fashion_mnist

pytestmark = needs_fashion_mnist

WORKER = Path(__file__).with_name("presets_worker.py")
SHARDED = ["set", "rigl", "granet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks wrote, two and then four."""
    folder = tmp_path_factory.mktemp("presets")
    on_two = [f"torch {method}" for method in METHODS] + [
        f"{stage} {method}" for method in SHARDED for stage in ("stage0", "stage1")
    ]
    on_four = ["stage1 granet", "stage0 granet"]
    run_ranks(
        WORKER, *((ranks, [folder, *cases, "flip rigl"]) for ranks, cases in ((2, on_two), (4, on_four))),
        log=folder / "log",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}-of-2.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}-of-4.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_with_the_same_masks_and_weights_on_both_ranks(two: list[dict[str, Any]], method: str) -> None:
    first, second = (result[f"torch {method}"] for result in two)
    assert first["history"] == second["history"]
    begin, end = first["losses"]
    assert end < (0.5 if METHODS[method].initial == "random" else 1) * begin
    changes = METHODS[method].changes_masks
    # Updates follow every 14th of 210 steps but the last; those of RigL and MEST end at three quarters, GMP's and
    # AC/DC's with the density of step 140; AC/DC is dense again at 42, 70 and 98, and until 140.
    fewer = {"rigl_cosine": 12, "stairs": 12}.get(METHODS[method].drop_schedule, 15)
    num_records = {"gmp": 11, "acdc": 8}.get(method, fewer) if changes else 1
    assert len(first["history"]) == num_records
    different = len({digest for _, digest, _, _ in first["history"]})
    assert different == (5 if method == "acdc" else num_records - changes)  # the end has the last update's masks
    expected = round((1 if method == "dense" else 0.1) * first["weights"])
    if METHODS[method].structure == "fan_in":  # a layer's weights divide by its outputs at the start, and stay as many
        assert first["initial"] == pytest.approx(expected, rel=0.1)
        expected = first["initial"]
    assert first["history"][-1][3] == expected
    if method == "acdc":
        steps = {step: count for step, *_, count in first["history"]}
        assert {step for step, count in steps.items() if count == expected} == {27, 55, 83, 139, 209}
        assert {step for step, count in steps.items() if count == first["weights"]} == {41, 69, 97}
    elif METHODS[method].initial_density is not None:
        active = [entry[3] for entry in first["history"]]
        assert active == sorted(active, reverse=True)
        assert (
            next(step for step, *_, count in first["history"] if count == expected) == 139
        )  # the first update at the schedule's end
    else:
        assert {entry[3] for entry in first["history"]} == {expected}
    assert first["r_s"] > (1.5 if changes else 1) * 0.1 or not changes


@pytest.mark.parametrize("method", SHARDED)
def test_deepspeed_stage_1_trains_the_network_of_stage_0(two: list[dict[str, Any]], method: str) -> None:
    histories = [result[f"{stage} {method}"]["history"] for result in two for stage in ("stage0", "stage1")]
    assert len(histories[0]) == 11
    assert all(history == histories[0] for history in histories)


def test_four_ranks_agree_in_both_stages(four: list[dict[str, Any]]) -> None:
    histories = [result[f"{stage} granet"]["history"] for result in four for stage in ("stage0", "stage1")]
    assert len(histories[0]) == 11
    assert all(history == histories[0] for history in histories)


def test_a_bit_that_flips_between_updates_is_found_within_one_check(
    two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    for results in (two, four):
        for result in results:
            message, code, steps = result["flip rigl"]
            expected = f"first in blocks.1.conv2.weight, ranks [{len(results) - 1}] against rank 0"
            assert f"masks differ between ranks after step 20: {expected}" in message
            assert code == 78
            assert steps <= 10

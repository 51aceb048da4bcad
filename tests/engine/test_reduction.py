"""Packed and dense averaging give the same training, in real processes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.config.load import load_config
from pipeline.engine.reduction import Reducer
from pipeline.errors import ConfigError
from pipeline.sparse.distribution import erk, exact_counts
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, Strategy
from tests.engine.reduction_worker import COMPILED, ENGINES, METHODS_TRAINED, cells
from tests.support.forked import run_ranks
from tests.support.launch import ROOT

WORKER = Path(__file__).with_name("reduction_worker.py")
CELLS = [name for name, _, _ in cells()]
# the worker's network: 13·3·9 + 17·13·9 + 9·17 + 10·81 = 3303 weights in 4 layers, of which
# round(0.2·3303) = 661 are active, and 13 + 17 + 9 + 10 = 49 biases; each of its 8 parameters has a
# flag
DENSE_BYTES, PACKED_BYTES = 4 * (3303 + 49 + 8), 4 * (661 + 49 + 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two, three and four ranks wrote."""
    folder = tmp_path_factory.mktemp("reduction")
    groups = [(ranks, [folder, "two" if ranks == 2 else "several"]) for ranks in (2, 3, 4)]
    run_ranks(WORKER, *groups, log=folder / "log")
    return folder


def results_of(folder: Path, *, ranks: int) -> dict[str, Any]:
    """Return what the ranks wrote, after asserting that all wrote the same bits."""
    found = [json.loads((folder / f"rank-{rank}-of-{ranks}.json").read_text()) for rank in range(ranks)]
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return results_of(folder, ranks=2)


@pytest.fixture(scope="module", params=[3, 4])
def several(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    return results_of(folder, ranks=request.param)


# -- two ranks


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS_TRAINED)
def test_packed_and_dense_training_are_equal_bit_for_bit_over_200_steps(
    two: dict[str, Any], engine: str, method: str
) -> None:
    packed, dense = two[f"{engine} | {method} | packed"], two[f"torch | {method} | dense"]
    assert packed["history"] == dense["history"]
    assert len({state["masks"] for state in packed["history"]}) == 20
    assert math.isclose(packed["norm"], dense["norm"], rel_tol=1e-6)
    assert dense["bytes"] == 200 * DENSE_BYTES
    # RigL reads the whole gradient on its 20 update steps, SET never
    num_whole = 20 if method == "rigl" else 0
    assert packed["bytes"] == num_whole * DENSE_BYTES + (200 - num_whole) * PACKED_BYTES


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_the_support_table(two: dict[str, Any], cell: str) -> None:
    packed, dense = two[f"{cell} | packed"], two[f"{cell} | dense"]
    reference = two[f"torch |{cell.split('|', 1)[1]} | dense"]
    assert packed["history"] == dense["history"] == reference["history"]
    assert len({state["masks"] for state in packed["history"]}) == 2
    assert dense["bytes"] == 8 * DENSE_BYTES  # also under autocast: nothing is rounded to bfloat16 unasked
    assert packed["bytes"] == 2 * DENSE_BYTES + 6 * PACKED_BYTES


def test_clipping_accumulation_and_precision_do_change_the_training(two: dict[str, Any]) -> None:
    ends = {cell: two[f"{cell} | packed"]["history"][-1]["weights"] for cell in CELLS if cell.startswith("torch")}
    assert len(set(ends.values())) == len(ends) == 8


def test_the_documents_show_the_table_that_is_tested() -> None:
    rows = ["| engine | precision | accumulation | clipping | |", "|---|---|---|---|---|"]
    for engine in ENGINES:
        own = [cell.split(" | ") for cell in CELLS if cell.startswith(engine)]
        precisions, accumulations, clip_norms = (list(dict.fromkeys(cell[i] for cell in own)) for i in (1, 2, 3))
        assert len(own) == len(precisions) * len(accumulations) * len(clip_norms)
        rows.append(
            f"| {engine} | {', '.join(precisions)} | {', '.join(accumulations)} | {', '.join(clip_norms)} | yes |"
        )
    rows.append("| deepspeed, stages 2 and 3 | | | | refused |")
    assert "\n".join(rows) in (ROOT / "docs" / "distributed.md").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_last_micro_batch_communicates_and_it_does_so_while_backward_goes_on(
    two: dict[str, Any], engine: str
) -> None:
    found = two[f"micro-batches {engine}"]
    assert found["buckets"] > 2
    assert len(found["bytes"]) == found["buckets"]  # for three micro-batches
    assert sum(found["bytes"]) == found["planned"] == PACKED_BYTES
    assert found["before the end"] == [found["buckets"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_said_to_be_masked_is(two: dict[str, Any], engine: str) -> None:
    assert two[f"own gradients {engine}"]["masked"] == [[True, True], [True, True], [False, False], [True, True]]


def test_only_active_weights_travel_after_a_step_of_stage_1(two: dict[str, Any]) -> None:
    (packed,) = two["exchanged"]["packed"]
    assert (661 + 49) / 2 <= packed < 661  # the larger of two partitions' shares of all that is active
    assert two["exchanged"]["dense"] == []  # left to DeepSpeed


@pytest.mark.parametrize(
    "engine", [engine for engine in ENGINES if engine != "deepspeed, stage 1"]
)  # which refuses: test_engines.py
def test_parameters_that_take_no_part_on_some_or_all_ranks(two: dict[str, Any], engine: str) -> None:
    found = dict(two[f"unused {engine}"])
    assert found.pop("none has moved") is False
    for name in ("body.weight", "body.bias", *(f"extra.{name}.weight" for name in ("both", "one", "early", "none"))):
        for dense in (False, True):
            assert found.pop(f"{name} dense={dense}") is (None if name == "extra.none.weight" else True)
    assert not found


def test_a_gradient_that_is_not_finite_is_seen_by_all_ranks_wherever_it_is_read(two: dict[str, Any]) -> None:
    # gradients [[3, 1], [1, 4]] with the diagonal active: norm 5
    assert two["not finite active"] == {
        "dense=False": ["not finite", "[[inf, 0.0], [0.0, 4.0]]"],
        "dense=True": ["not finite", "[[inf, 1.0], [1.0, 4.0]]"],
    }
    assert two["not finite pruned"] == {
        "dense=False": [5.0, "[[3.0, 0.0], [0.0, 4.0]]"],  # it does not travel, and nothing reads it
        "dense=True": ["not finite", "[[3.0, inf], [1.0, 4.0]]"],
    }


@pytest.mark.parametrize("engine", COMPILED)
def test_a_compiled_network_trains_as_the_network_itself(two: dict[str, Any], engine: str) -> None:
    compiled, plain = two[f"compiled {engine}"], two[f"{engine} | fp32 | 1 | None | packed"]
    assert compiled == plain  # states after two updates, bytes that were sent, and gradient norm


def test_a_mask_without_its_parameter_is_refused() -> None:
    weight, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    reducer = Reducer({"weight": weight, "frozen": frozen}, reduction="packed", wire="fp32", bucket_mb=25)
    for name in ("_orig_mod.weight", "frozen"):
        with pytest.raises(ConfigError, match=rf"^masks: {name} is not a parameter of the engine's network that req"):
            reducer.use_masks({"weight": torch.eye(2, dtype=torch.bool), name: torch.eye(2, dtype=torch.bool)})


def test_bf16_on_the_wire_halves_the_bytes_and_rounds_to_eight_bits(two: dict[str, Any]) -> None:
    exact, rounded = two["wire fp32"], two["wire bf16"]
    assert (exact["bytes"], rounded["bytes"]) == (PACKED_BYTES, PACKED_BYTES // 2)
    largest = max(abs(value) for value in exact["gradients"])
    errors = [abs(one - other) for one, other in zip(exact["gradients"], rounded["gradients"], strict=True)]
    assert 0 < max(errors) < 2**-7 * largest  # two roundings of half a unit in 2⁻⁸
    assert exact["state"] != rounded["state"]
    assert math.isclose(exact["norm"], rounded["norm"], rel_tol=0.05)


# -- three and four ranks, where packing changes the order of summation


@pytest.mark.parametrize("method", METHODS_TRAINED)
def test_on_more_ranks_the_masks_are_equal_in_float64_and_fp32_is_within_rounding(
    several: dict[str, Any], method: str
) -> None:
    double, single = several[f"{method} torch.float64"], several[f"{method} torch.float32"]
    assert double["history"][0] == double["history"][1]
    assert double["mask bits"] == 0
    assert double["weights"]["largest"] < 1e-13
    assert 0 < single["gradient"]["largest"] < 2e-7  # of the largest: a unit in the last place is 1.2e-7
    assert single["gradient"]["share"] < 0.5


def test_on_more_ranks_a_resumed_run_has_the_same_bits(several: dict[str, Any]) -> None:
    straight, again = several["resumed"]
    assert straight == again


# -- without processes


def test_bytes_of_resnet50_at_a_tenth_of_the_weights() -> None:
    model = models.build("resnet50")
    reducer = Reducer(dict(model.named_parameters()), reduction="packed", wire="fp32", bucket_mb=25)
    shapes = {name: tuple(weight.shape) for name, weight in sparse_weights(model).items()}
    counts = exact_counts(shapes, erk(shapes, 0.1), 0.1)
    reducer.use_masks(
        {name: (torch.arange(math.prod(shape)) < counts[name]).view(shape) for name, shape in shapes.items()}
    )
    # 25,557,032 parameters in 161 tensors, 25,502,912 of them sparse weights, of which 2,550,291 are active
    whole, packed = reducer.num_bytes(dense=True), reducer.num_bytes(dense=False)
    assert whole == 4 * (25_557_032 + 161)
    assert packed == 4 * (2_550_291 + 25_557_032 - 25_502_912 + 161)
    assert round(whole / packed, 2) == 9.81
    assert round(whole / (0.99 * packed + 0.01 * whole), 2) == 9.02  # RigL, one update in 100 steps
    dense = Reducer(dict(model.named_parameters()), reduction="dense", wire="bf16", bucket_mb=25)
    assert dense.num_bytes(dense=False) == whole // 2


def test_buckets_get_smaller_towards_the_end() -> None:
    mebibytes = {str(index): nn.Parameter(torch.empty(1 << 18)) for index in range(40)}
    reducer = Reducer(mebibytes, reduction="packed", wire="fp32", bucket_mb=16)
    assert [len(bucket.parameters) for bucket in reducer._buckets] == [
        16,
        12,
        6,
        3,
        2,
        1,
    ]  # of what is left half, at most 16


def test_one_rank_keeps_its_gradient_and_reports_the_norm_of_the_active_weights() -> None:
    layer = nn.Conv2d(2, 1, (1, 2), bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reducer = Reducer(dict(layer.named_parameters()), reduction="packed", wire="fp32", bucket_mb=25)
    reducer.use_masks({"weight": torch.tensor([[[[True, False]], [[False, True]]]])})
    reducer.start(dense=False)
    (layer.weight * torch.tensor([[[[3.0, 7.0]], [[9.0, 4.0]]]])).sum().backward()
    assert reducer.finish() == 5  # √(3² + 4²)
    assert layer.weight.grad is not None
    assert layer.weight.grad.flatten().tolist() == [3, 7, 9, 4]


READS_GRADIENTS = {
    "rigl": "updates",
    "srigl": "updates",
    "rigl_itop": "updates",
    "granet": "updates",
    "mixed": "updates",
    "snfs": "always",
}


@pytest.mark.parametrize("method", METHODS)
def test_which_methods_need_the_whole_gradient(method: str) -> None:
    expected = READS_GRADIENTS.get(method, "never")
    masks = "random" if METHODS[method].initial == "random" else "magnitude"
    sparsifier = _sparsifier(METHODS[method], masks=masks)
    assert sparsifier.needs_dense_gradient() == (expected == "always")
    assert sparsifier.needs_dense_gradient(0.3) == (expected != "never")


def test_an_update_that_was_put_off_needs_the_whole_gradient_in_the_next_step() -> None:
    sparsifier = _sparsifier(METHODS["rigl"], skip_nonfinite=True)
    (weight,) = sparsifier.weights.values()
    weight.grad = torch.full_like(weight, math.nan)
    assert sparsifier.before_step(0.3) is False
    sparsifier.after_step()
    assert sparsifier.needs_dense_gradient()
    weight.grad = torch.ones_like(weight)
    assert sparsifier.before_step()
    assert sparsifier.after_step() is not None
    assert not sparsifier.needs_dense_gradient()


def test_growth_that_reads_the_gradient_in_second_place_needs_it_too() -> None:
    assert _sparsifier(
        dataclasses.replace(METHODS["set_itop"], grow_share=0.5, grow_rest="gradient")
    ).needs_dense_gradient(0.3)


def _sparsifier(strategy: Strategy, **options: Any) -> Sparsifier:
    model = nn.Linear(8, 8, bias=False)
    return Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), strategy, density=0.5, seed=0, **options)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.reduction=sparse", "train.reduction: 'sparse' is not one of packed, dense"),
        ("train.wire=fp16", "train.wire: 'fp16' is not one of fp32, bf16"),
        ("train.bucket_mb=0", "train.bucket_mb: expected a number > 0, got 0.0"),
        ("train.engine=dpp", "train.engine: 'dpp' is not one of deepspeed, torch, ddp; did you mean 'ddp'?"),
        (
            "train.zero_stage=2",
            "train.zero_stage: 2 is not supported, because it partitions the gradients among the ranks",
        ),
        (
            "train.zero_stage=3",
            "train.zero_stage: 3 is not supported, because it partitions the gradients among the ranks",
        ),
    ],
)
def test_invalid_settings_are_refused_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("fashion_mnist_s90", ["data.train=t", "data.val=v", override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)

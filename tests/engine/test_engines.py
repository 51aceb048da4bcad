"""Every engine gives the Sparsifier the same gradients and takes the same step.

Two real processes write their states, and the tests compare them.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.load import load_config
from pipeline.config.schema import TrainConfig
from pipeline.engine.build import build_engine
from pipeline.engine.compiled import compiling
from pipeline.engine.torch_engine import place_model
from pipeline.errors import ConfigError
from tests.support.forked import run_ranks

WORKER = Path(__file__).with_name("engine_worker.py")
ENGINES = ("torch", "stage 0", "stage 1")
TRAINED = [
    *(
        f"{method} {accumulation} {precision}"
        for method in ("set", "rigl")
        for accumulation in (1, 2)
        for precision in ("fp32", "bf16")
    ),
    *("contiguous", "clipped", "adamw"),
]  # "muon" is for stage 0 only
# weights of the worker's network: 13·3·9 + 17·13·9 + 9·17 + 10·81 = 3303, of which a density of 0.2 prunes 3303 − 661
NUM_PRUNED = 2642


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    run_ranks(WORKER, (2, [folder]), log=folder / "log")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def results(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return ranks[0]


def test_both_ranks_wrote_down_the_same(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0] == ranks[1]  # losses differ, and are not in it


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_after_backward_the_gradient_is_that_of_the_whole_batch(
    results: dict[str, Any], engine: str, accumulation: int
) -> None:
    found = results[f"gradient {engine} {accumulation}"]
    assert found["error"] < 1e-6  # of the largest component, against one float64 pass over all samples
    assert found["has the weights' strides"] and found["top-1 is that of the batch"]
    assert found == results[f"gradient torch {accumulation}"]


def test_with_mixed_labels_top1_is_of_the_class_with_the_larger_share() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[1].weight)  # the logits are the three channels of a pixel
    engine = build_engine(model, TrainConfig(engine="torch", global_batch=4, channels_last=False))
    images = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 0, 0]]).view(4, 3, 1, 1)
    shares = torch.tensor([[0.6, 0.4, 0], [0.4, 0.6, 0], [0.1, 0.0, 0.9], [0.3, 0.7, 0]])
    assert engine.backward(images, shares, lr=0.0)[1] == 0.75
    assert engine.backward(images, torch.tensor([0, 0, 2, 1]), lr=0.0)[1] == 0.5


def test_a_compiled_network_has_the_names_the_loss_and_the_gradient_of_the_network(results: dict[str, Any]) -> None:
    found = results["compiled"]
    assert found["names"] == [f"{layer}.{kind}" for layer in (0, 1, 3, 5, 8) for kind in ("weight", "bias")]
    assert found["error"] < 1e-6  # of the largest component
    assert found["loss"] < 1e-6 and found["top-1 is equal"]


def test_compiled_training_has_the_masks_of_eager_training_on_two_ranks(results: dict[str, Any]) -> None:
    masks = [step["masks"] for step in results["torch compiled"]]
    assert masks == [step["masks"] for step in results["torch rigl 1 fp32"]]
    assert len(set(masks)) == 7  # the first ones, and those of six updates


@pytest.mark.parametrize("engine", ["ddp", "stage 0", "stage 1"])
def test_compiled_training_has_the_same_bits_in_every_engine(results: dict[str, Any], engine: str) -> None:
    assert results[f"{engine} compiled"] == results["torch compiled"]


def test_compiled_training_resumes_with_the_same_bits_after_it_was_compiled_again(results: dict[str, Any]) -> None:
    straight, resumed = results["compiled twice"]
    assert straight == resumed


def test_an_error_of_the_compiler_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: torch cannot compile the network") as caught, compiling():
        raise torch._inductor.exc.InvalidCxxCompiler
    assert "train.compile=false" in caught.value.do


def test_other_errors_pass_the_compiler_unchanged() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), compiling():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("engine", ENGINES)
def test_with_autocast_the_gradient_is_neither_scaled_nor_rounded_differently(
    results: dict[str, Any], engine: str
) -> None:
    found = results[f"gradient {engine} bf16"]
    assert found["error"] < 0.03  # bfloat16 has 8 bits: 2⁻⁸ = 0.004 in each of several layers
    assert found == results["gradient torch bf16"]


@pytest.mark.parametrize("engine", ENGINES)
def test_growth_sees_the_whole_gradient_and_the_step_is_clipped_to_the_norm_of_what_masking_left(
    results: dict[str, Any], engine: str
) -> None:
    found = results[f"clipped {engine}"]
    assert found["seen"] > 0.2
    assert math.isclose(found["seen"], found["reported"], rel_tol=1e-5)
    assert math.isclose(found["moved"], 0.01, rel_tol=1e-4)  # clip_norm at learning rate 1
    assert found["cosine"] > 0.999999


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_skipped_or_bad_leaves_no_trace(results: dict[str, Any], engine: str) -> None:
    skipped, bad, without = results[f"skipped {engine}"]
    assert skipped == bad == without
    assert set(skipped) == {"weights", "momentum_buffer"}


@pytest.mark.parametrize("stage", ["stage 0", "stage 1"])
@pytest.mark.parametrize("case", TRAINED)
def test_weights_masks_and_moments_are_equal_bit_for_bit_after_each_of_24_steps(
    results: dict[str, Any], stage: str, case: str
) -> None:
    found, expected = results[f"{stage} {case}"], results[f"torch {case}"]
    assert len(found) == 24
    assert found == expected
    assert len({step["masks"] for step in found}) == 7  # six updates
    assert {"weights", "masks", "exp_avg_sq" if case == "adamw" else "momentum_buffer"} <= set(found[0])


def test_muon_keeps_pruned_weights_at_0_and_its_bits_in_every_engine_and_on_resume(results: dict[str, Any]) -> None:
    found = results["torch muon"]  # pruned weights are checked after each step
    assert found == results["stage 0 muon"] and len({step["masks"] for step in found}) == 7
    assert {"weights", "masks", "momentum_buffer", "exp_avg", "exp_avg_sq", "step"} == set(found[-1])
    for saved_by in ("stage 0", "torch"):
        straight, resumed = results[f"resumed muon {saved_by}"]
        assert straight == resumed and "momentum_buffer" in straight


@pytest.mark.parametrize("engine", ENGINES)
def test_the_average_of_the_weights_is_masked_equal_on_all_ranks_and_changes_no_bit_of_the_network(
    results: dict[str, Any], engine: str
) -> None:
    found = results[f"{engine} averaged"]
    assert found["history"] == results[f"{engine} rigl 1 fp32"][:8]  # without an average
    assert (found["is_right"], found["is_apart"], found["num_pruned_nonzero"]) == (True, True, 0)
    assert found == results["torch averaged"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_narrow_convolution_takes_its_pixels_first(results: dict[str, Any], engine: str) -> None:
    assert results[f"stride {engine}"] == [1, 1]  # its stride is taken before it: oneDNN would damage memory


def test_masking_the_model_alone_is_undone_by_the_next_step_of_stage_1(results: dict[str, Any]) -> None:
    naive = results["masked without"]
    assert naive["history"] == [
        0,
        NUM_PRUNED,
        NUM_PRUNED,
        NUM_PRUNED,
        0,
        NUM_PRUNED,
    ]  # the update masks anew, the next step undoes it
    assert naive["check"].startswith("78 0.weight has non-zero values where its mask is 0")
    said = "78 0.weight has non-zero values where its mask is 0 (check after step 1)"
    assert naive["first"].startswith(said)  # with check_every=0
    assert results["masked with fragments"] == {"history": [0] * 6, "first": "", "check": ""}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [("stage 1", "stage 1"), ("stage 0", "stage 1"), ("stage 1", "stage 0")]
)
def test_a_resumed_run_has_the_same_bits(
    results: dict[str, Any], optimizer: str, saved_by: str, loaded_by: str
) -> None:
    straight, resumed = results[f"resumed {optimizer} {saved_by} {loaded_by}"]
    assert straight == resumed
    assert ("step" in straight) == (optimizer == "adamw")


def test_deepspeed_does_not_wait_for_the_device_unless_a_user_sets_its_timers(results: dict[str, Any]) -> None:
    assert results["synchronisations"] == [0] * 5
    # from its third step on, DeepSpeed times each of the two micro-batches at its start, and both ends of the step
    assert results["synchronisations, timed"][-1] == 3


def test_a_deepspeed_that_keeps_gradients_elsewhere_is_refused(results: dict[str, Any]) -> None:
    assert results["unknown"].startswith("69 train.zero_stage: DeepSpeed 0.19")
    assert "hooks take gradients away" in results["unknown"]


def test_stage_1_names_weights_without_a_gradient(results: dict[str, Any]) -> None:
    assert results["unused"].startswith("64 train.zero_stage: 9.extra.weight, 9.extra.bias took no part in the loss")


def test_deepspeed_is_imported_without_mlflow(results: dict[str, Any]) -> None:
    assert results["mlflow"] is False


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.zero_stage=2"],
            "train.zero_stage: 2 is not supported, because it partitions the gradients among the ranks",
        ),
        (["train.zero_stage=4"], "train.zero_stage: 4 is not one of 0, 1"),
        (
            ["train.zero_stage=1", "train.engine=torch"],
            "train.zero_stage: 1 needs train.engine 'deepspeed', got 'torch'",
        ),
        (["train.optimizer=adam"], "'adam' is not one of sgd, adamw, muon; did you mean 'adamw'?"),
        (
            ["train.optimizer=muon", "train.zero_stage=1"],
            "train.zero_stage: stage 1 splits the optimizer's state",
        ),
        (
            ["train.optimizer=adamw", "train.nesterov=true"],
            "train.nesterov: true needs train.optimizer 'sgd' with momentum",
        ),
        (
            ["train.momentum=0", "train.nesterov=true"],
            "train.nesterov: true needs train.optimizer 'sgd' with momentum above 0, got 'sgd' with momentum 0",
        ),
        (["train.betas=[0.9]"], "train.betas: expected two numbers, each >= 0 and < 1, got [0.9]"),
        (["train.betas=[0.9, 1]"], "train.betas: expected two numbers, each >= 0 and < 1, got [0.9, 1.0]"),
        (["train.clip_norm=0"], "train.clip_norm: expected a number > 0, got 0.0"),
        (["train.eps=0"], "train.eps: expected a number > 0 and <= 1, got 0.0"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("fashion_mnist_s90", ["data.train=t", "data.val=v", *overrides])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_inputs", "stride", "is_changed"), [(2, 2, True), (7, 3, True), (16, 2, False), (4, 1, False)]
)
def test_narrow_strided_1x1_convolutions_have_the_same_results_without_a_stride(
    num_inputs: int, stride: int, is_changed: bool
) -> None:
    """In channels-last format oneDNN would write behind the end of a buffer, which may end this process."""
    torch.manual_seed(0)
    layer = nn.Conv2d(num_inputs, 6, 1, stride, bias=False)
    images, top = torch.randn(8, num_inputs, 32, 32), torch.randn(8, 6, -(-32 // stride), -(-32 // stride))
    expected = copy.deepcopy(layer).double()
    placed = place_model(nn.Sequential(layer), TrainConfig(channels_last=True))
    for model, kind in ((expected, torch.float64), (placed, torch.float32)):
        for _ in range(5):
            model.zero_grad()
            given = images.to(
                kind, memory_format=torch.contiguous_format if kind == torch.float64 else torch.channels_last
            )
            model(given).backward(top.to(kind))
    assert layer.stride == ((1, 1) if is_changed else (stride, stride))
    assert torch.allclose(placed(images), expected(images.double()).float(), atol=1e-5)
    assert layer.weight.grad is not None and expected.weight.grad is not None
    assert torch.allclose(layer.weight.grad, expected.weight.grad.float(), rtol=1e-4, atol=1e-3)

"""Unusual models, optimisers, gradients and states: the Sparsifier refuses them or handles them right."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, IntegrityError, NumericsError
from pipeline.sparse import criteria
from pipeline.sparse.select import multiply_by_masks
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, Strategy
from pipeline.sparse.timing import DueUpdate
from pipeline.sparse.update import grow_to, magnitude_masks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make(
    strategy: Strategy = METHODS["rigl"], density: float = 0.5, **options: Any
) -> tuple[nn.Sequential, Any, Sparsifier]:
    model = network()
    opt = sgd(model)
    return model, opt, Sparsifier(model, opt, strategy, density=density, seed=0, **options)


def backward(model: nn.Module, seed: int = 1) -> None:
    model.zero_grad()
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_permuted", [False, True])
def test_masking_leaves_neither_nan_nor_sign(dtype: torch.dtype, is_permuted: bool) -> None:
    tensor = torch.tensor([math.nan, -1.0, math.inf, -2.0, -math.inf, 3.0, -0.0, 5.0], dtype=dtype).view(1, 2, 2, 2)
    mask = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1]).bool().view(1, 2, 2, 2)
    if is_permuted:
        tensor = tensor.to(memory_format=torch.channels_last)
    multiply_by_masks([(tensor, mask)])
    assert tensor.flatten().tolist() == [0, 0, 0, -2, 0, 3, 0, 5]
    assert not tensor[~mask].signbit().any()


def test_layers_of_different_dtypes_are_ranked_together() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(200_000, generator=generator),
        "b": torch.randn(200_000, generator=generator, dtype=torch.float64),
    }
    masks = magnitude_masks(weights, 40_000)
    assert sum(int(mask.sum()) for mask in masks.values()) == 40_000
    weakest = min(float(weight[masks[name]].abs().min()) for name, weight in weights.items())
    assert all(float(weight[~masks[name]].abs().max()) <= weakest for name, weight in weights.items())


def test_a_rising_density_grows_in_stages() -> None:
    masks = {"w": torch.tensor([True, False, False, False, False])}
    first, second = {"w": torch.tensor([0.0, 1, 2, 3, 4])}, {"w": torch.tensor([0.0, 4, 3, 2, 1])}
    assert grow_to(masks, [(first, 0.5), (second, 1.0)], 3)["w"].int().tolist() == [1, 1, 0, 0, 1]


def test_what_requires_no_gradient_is_left_alone_and_what_got_none_keeps_its_mask() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad = False
    frozen = model[0].weight.detach().clone()
    opt = sgd(model)
    sparsifier = Sparsifier(model, opt, METHODS["rigl"], density=0.5, seed=0)
    assert list(sparsifier.weights) == ["1.weight", "2.weight"]
    unused = sparsifier.masks["2.weight"].clone()
    model[1](model[0](torch.ones(2, 8))).sum().backward()  # without the last layer
    sparsifier.before_step(0.4)
    opt.step()
    assert sparsifier.after_step().num_new > 0
    assert torch.equal(sparsifier.masks["2.weight"], unused)
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("field", ["gradient", "average"])
def test_a_criterion_may_return_a_view_of_what_it_reads(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = criteria.Growth(lambda inputs: getattr(inputs, field).reshape(-1), reads=field)  # type: ignore[arg-type]
    monkeypatch.setitem(criteria.GROW, "view", rule)
    model, _, sparsifier = make(Strategy("view"))
    backward(model)
    weight = model[0].weight
    assert weight.grad is not None
    weight.grad.zero_()
    position = int((~sparsifier.masks["0.weight"]).flatten().nonzero()[3])
    weight.grad.view(-1)[position] = 5.0
    sparsifier.before_step(0.1)
    sparsifier.after_step()
    assert sparsifier.masks["0.weight"].view(-1)[position]
    assert all(torch.isfinite(average).all() for average in sparsifier.average.values())


def test_a_density_alone_is_an_update() -> None:
    model, _, sparsifier = make()
    backward(model)
    assert not sparsifier.needs_dense_gradient(DueUpdate(density=0.25))  # a step down reads weights only
    assert sparsifier.needs_dense_gradient(DueUpdate(density=0.75))
    assert sparsifier.before_step(DueUpdate(density=0.25))
    update = sparsifier.after_step()
    assert (update.num_active, sparsifier.density) == (64, 0.25)
    sparsifier.before_step(DueUpdate(0.0, 0.25))
    assert sparsifier.after_step() is None  # nothing to do


def test_bad_gradients_anywhere_stop_an_update_and_large_ones_do_not() -> None:
    model, _, sparsifier = make()
    backward(model)
    model[0].bias.grad[0] = math.inf
    with pytest.raises(NumericsError, match=r"gradient of 0\.bias is not finite at step 0; no mask was changed"):
        sparsifier.before_step(0.3)
    backward(model)
    for parameter in model.parameters():
        parameter.grad.fill_(1e20)  # of a norm that overflows
    assert sparsifier.before_step(0.3)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"2\.weight is not finite"):
        sparsifier.before_step(0.3)


def test_an_abandoned_update_does_not_come_later() -> None:
    model, opt, sparsifier = make()
    backward(model)
    sparsifier.before_step(0.3)  # and then the caller gives the step up
    backward(model)
    sparsifier.before_step()
    opt.step()
    assert sparsifier.after_step() is None


def test_a_postponed_update_outlives_a_restart() -> None:
    model, _, sparsifier = make(skip_nonfinite=True)
    backward(model)
    model[0].weight.grad[0, 0] = math.nan
    assert not sparsifier.before_step(DueUpdate(0.3, 0.25))
    state = copy.deepcopy(sparsifier.state_dict())
    other, _, restored = make(skip_nonfinite=True)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(state)
    backward(other)
    assert restored.before_step()
    assert restored.after_step().num_active == 64


def test_own_step_counts_follow_a_reloaded_optimiser_and_a_scaler_that_skips() -> None:
    model = network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, opt, METHODS["rigl"], density=0.5, seed=0, own_step_counts=True)
    backward(model)
    sparsifier.before_step()
    sparsifier.after_step()  # the very first step skipped
    for drop in (None, 0.5, None):
        backward(model)
        sparsifier.before_step(drop)
        opt.step()
        sparsifier.after_step()
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 1e-6
    opt.load_state_dict(state)
    for is_skipped in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model)
        sparsifier.before_step()
        if not is_skipped:
            opt.step()
        sparsifier.after_step()
        moved = max(float((p.detach() - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == 0 if is_skipped else 0 < moved < 1e-5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["masks"]["0.weight"].view(-1)[:1].logical_not_(), "not those that were saved"),
        (
            lambda s: s["masks"].update({"0.weight": torch.ones(1, 8, dtype=torch.bool)}),
            r"0\.weight is of shape \(1, 8\), not \(16, 8\)",
        ),
        (lambda s: s["ever_active"].pop("0.weight"), "other layers"),
        (lambda s: s["numbers"].pop("history_digest"), "another method"),
        (lambda s: s["numbers"].update(seed=5), "seed 5, not 0"),
        (lambda s: s["tensors"].update(x=torch.ones(1)), "another method"),
    ],
)
def test_a_state_that_is_not_this_ones_is_refused(change: Callable[[Any], object], expected: str) -> None:
    sparsifier = make()[2]
    state = copy.deepcopy(sparsifier.state_dict())
    change(state)
    with pytest.raises(IntegrityError, match=expected):
        sparsifier.load_state_dict(state)


def test_optimiser_state_that_is_not_zero_at_a_zero_gradient_is_no_fault() -> None:
    model = network()
    opt = torch.optim.Rprop(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, opt, METHODS["rigl"], density=0.5, seed=0)
    backward(model)
    sparsifier.before_step(0.3)
    opt.step()
    sparsifier.after_step()
    sparsifier.load_state_dict(copy.deepcopy(sparsifier.state_dict()))


def test_names_are_those_of_the_network_itself() -> None:
    class Compiled(nn.Module):  # as torch.compile names what it wraps
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model, average = network(), network()
    sparsifier = Sparsifier(
        Compiled(model),
        sgd(model),
        METHODS["static"],
        density=0.5,
        seed=0,
        dense_layers=["2.weight"],
        shadows=[Compiled(average)],
    )
    assert list(sparsifier.weights) == ["0.weight"]
    assert not average[0].weight[~sparsifier.masks["0.weight"]].any()


@pytest.mark.parametrize(
    ("strategy", "density", "expected"),
    [
        ({}, 2.0, r"density: 2\.0 is not in"),
        ({}, math.nan, "density: nan is not in"),
        ({"grow": "gradiant"}, 0.5, "grow: 'gradiant' is not one of gradient, momentum"),
        ({"prune": "small"}, 0.5, "prune: 'small' is not one of magnitude"),
        ({"distribution": "flat"}, 0.5, "distribution: 'flat' is not one of uniform"),
        ({"scope": "galaxy"}, 0.5, "scope: 'galaxy' is not one of layer"),
        ({"structure": "2 of 4"}, 0.5, "structure: '2 of 4' is not one of"),
        ({"structure": "2:4", "distribution": "uniform"}, 0.1, r"density: structure '2:4' means density 0\.5"),
        (
            {"structure": "2:4", "distribution": "uniform", "scope": "global"},
            0.5,
            "scope: 'global' ranks growth over all layers",
        ),
        ({"structure": "block 8x8"}, 0.1, r"density: 0\.1 leaves no weight in"),
    ],
)
def test_an_invalid_strategy_is_refused(strategy: dict[str, Any], density: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(dataclasses.replace(METHODS["rigl"], **strategy), density)


def test_an_invalid_model_or_optimiser_is_refused() -> None:
    model = network()
    for bad, optimizer, shadows, expected in (
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), sgd(model), [], "has no values yet; do: initialise"),
        (network().to("meta"), sgd(model), [], "has no values yet"),
        (nn.ReLU(), sgd(model), [], "no weight of the model that can be sparse is left"),
        (copy.deepcopy(model), sgd(model), [], r"0\.weight is not in the optimiser; do: build"),
        (model, sgd(model), [nn.Linear(8, 16)], r"shadows: 0\.weight is missing from one"),
    ):
        with pytest.raises(ConfigError, match=expected):
            Sparsifier(bad, optimizer, METHODS["rigl"], density=0.5, seed=0, shadows=shadows)


@pytest.mark.parametrize(
    ("method", "drop", "density", "expected"),
    [
        ("rigl", 1.5, None, r"drop fraction: expected 0 to 1, got 1\.5"),
        ("rigl", math.nan, None, "drop fraction: expected 0 to 1, got nan"),
        ("rigl", 0.0, 2.0, r"density: expected .* at most 1, got 2\.0"),
        ("static", 0.0, 0.75, "density 0.75 is above the present density 0.5"),
    ],
)
def test_an_invalid_update_is_refused(method: str, drop: float, density: float | None, expected: str) -> None:
    model, _, sparsifier = make(METHODS[method])
    backward(model)
    with pytest.raises(ConfigError, match=expected):
        sparsifier.before_step(DueUpdate(drop, density))


def test_structure_and_density_steps_exclude_each_other() -> None:
    model, _, sparsifier = make(dataclasses.replace(METHODS["rigl"], structure="2:4", distribution="uniform"))
    backward(model)
    with pytest.raises(ConfigError, match="structure '2:4' fixes the density"):
        sparsifier.before_step(DueUpdate(0.3, 0.4))
    sparsifier.before_step(DueUpdate(0.3, 0.5))  # which it has
    sparsifier.after_step()
    groups: Tensor = sparsifier.masks["0.weight"].view(-1, 4).sum(1)
    assert groups.tolist() == [2] * 32

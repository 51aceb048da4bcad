"""One pass over the weights gives the bits of torch's plain step, for every element of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.engine import masked_sgd
from pipeline.engine.sgd import OnePassSGD
from pipeline.sparse.select import multiply_by_masks

SHAPES = [(1,), (15,), (16,), (1613,), (33, 17, 3, 3), (64, 16, 3, 3)]
OPTIONS = [{}, {"weight_decay": 5e-4}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(
    optimizer: type[torch.optim.SGD],
    *,
    memory_format: torch.memory_format,
    options: dict[str, Any],
    is_transposed: bool,
    is_masked: bool = False,
) -> list[Any]:
    """Return weights and buffers after four steps; the second has no gradient for the first weight.

    With ``is_masked``, half of the values are inactive; our optimiser masks their gradients itself.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(memory_format=memory_format) if len(shape) == 4 else values

    weights = [nn.Parameter(draw(shape)) for shape in SHAPES]
    stepper = optimizer(weights, lr=0.1, fused=False, **options)
    masks = {weight: torch.empty_like(weight, dtype=torch.bool).copy_(draw(weight.shape) > 0) for weight in weights}
    if is_masked and isinstance(stepper, OnePassSGD):
        stepper.use_masks(masks)
        assert stepper.is_masking
    for step in range(4):
        for weight in weights:
            weight.grad = draw(tuple(weight.shape))
            if is_transposed and weight.dim() == 4:
                weight.grad = weight.grad.transpose(2, 3).contiguous().transpose(2, 3)
        if step == 1:
            weights[0].grad = None
        if is_masked and not isinstance(stepper, OnePassSGD):
            multiply_by_masks((weight.grad, masks[weight]) for weight in weights if weight.grad is not None)
        stepper.step()
    return [[weight.detach(), stepper.state[weight].get("momentum_buffer")] for weight in weights]


@pytest.mark.parametrize("is_masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "gradients lie otherwise"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_the_plain_step(
    options: dict[str, Any],
    memory_format: torch.memory_format,
    is_transposed: bool,
    is_masked: bool,
    one_thread: None,
) -> None:
    ours, plain = (
        trained(
            optimizer,
            memory_format=memory_format,
            options=options,
            is_transposed=is_transposed,
            is_masked=is_masked,
        )
        for optimizer in (OnePassSGD, torch.optim.SGD)
    )
    for (weight, buffer), (plain_weight, plain_buffer) in zip(ours, plain, strict=True):
        assert weight.stride() == plain_weight.stride()
        assert torch.equal(weight, plain_weight)
        assert (buffer is None) == (plain_buffer is None) == ("momentum" not in options)
        assert buffer is None or torch.equal(buffer, plain_buffer)


def test_a_first_gradient_may_come_later() -> None:
    """Torch's fused step, which a GPU takes, fails where some weights of a group have momentum and others none."""
    weights = [nn.Parameter(torch.ones(32)) for _ in range(2)]

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for weight in weights:
            weight.grad = None
        weights[0].grad = torch.ones(32)
        optimizer.step()
        weights[1].grad = torch.ones(32)
        optimizer.step()

    with pytest.raises(TypeError, match="NoneType"):
        steps(torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True))
    weights = [nn.Parameter(torch.ones(32)) for _ in range(2)]
    steps(OnePassSGD(weights, lr=0.1, momentum=0.9))
    # 1 − 0.1·1 − 0.1·(0.9 + 1) with momentum from the first step; 1 − 0.1·1 in the later one's first
    assert [weight[0].item() for weight in weights] == pytest.approx([0.71, 0.9])


def test_masked_steps_change_nothing_where_the_gradients_are_not_finite(one_thread: None) -> None:
    weight = nn.Parameter(torch.ones(32))
    optimizer = OnePassSGD([weight], lr=0.1, momentum=0.9)
    optimizer.use_masks({weight: torch.arange(32) < 16})
    weight.grad = torch.full((32,), 2.0)
    weight.grad[20] = math.nan  # inactive
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(32))
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(32).index_fill(0, torch.arange(16), 0.8))


def test_masks_are_left_to_others_where_the_step_would_be_slower_or_round_otherwise(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.ones(32))
    mask = torch.arange(32) < 16
    optimizer = OnePassSGD([weight], lr=0.1)
    assert not optimizer.is_masking
    optimizer.use_masks({nn.Parameter(torch.ones(32)): mask})  # of a part of it, as ZeRO stage 1 holds them
    assert not optimizer.is_masking
    optimizer.use_masks({weight: mask})
    assert optimizer.is_masking
    torch.set_num_threads(2)
    assert not optimizer.is_masking
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not optimizer.is_masking
    monkeypatch.undo()
    monkeypatch.setattr(masked_sgd, "_compiled", lambda: None)
    assert not optimizer.is_masking

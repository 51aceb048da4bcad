"""One pass over the weights gives the bits of torch's plain step, for every element of a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.engine.sgd import OnePassSGD

SHAPES = [(1,), (15,), (16,), (1613,), (33, 17, 3, 3), (64, 16, 3, 3)]
OPTIONS = [{}, {"weight_decay": 5e-4}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}]


def trained(
    optimizer: type[torch.optim.SGD],
    *,
    memory_format: torch.memory_format,
    options: dict[str, Any],
    is_transposed: bool,
) -> list[Any]:
    """Return weights and buffers after four steps; the second has no gradient for the first weight."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(memory_format=memory_format) if len(shape) == 4 else values

    weights = [nn.Parameter(draw(shape)) for shape in SHAPES]
    stepper = optimizer(weights, lr=0.1, fused=False, **options)
    for step in range(4):
        for weight in weights:
            weight.grad = draw(tuple(weight.shape))
            if is_transposed and weight.dim() == 4:
                weight.grad = weight.grad.transpose(2, 3).contiguous().transpose(2, 3)
        if step == 1:
            weights[0].grad = None
        stepper.step()
    return [[weight.detach(), stepper.state[weight].get("momentum_buffer")] for weight in weights]


@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "gradients lie otherwise"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_of_the_plain_step(
    options: dict[str, Any], memory_format: torch.memory_format, is_transposed: bool
) -> None:
    ours, plain = (
        trained(optimizer, memory_format=memory_format, options=options, is_transposed=is_transposed)
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

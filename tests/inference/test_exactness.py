"""Outputs are torch's, to 1e-4 of the largest number: networks, and random layers of every kind."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.support.samples import network_ticket
from pipeline.inference import SparseNetwork
from pipeline.inference.build import build_engine
from pipeline.inference.jit import host

LANES = (4, 8, 16)
TOLERANCE = 1e-4
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Hardsigmoid)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def run(model: nn.Module, images: Tensor, *, lanes: int = 0, threads: int = 1) -> tuple[Tensor, dict[str, int]]:
    engine = build_engine(
        copy.deepcopy(model).to("meta"),
        tuple(images.shape[1:]),  # type: ignore[arg-type]
        model.state_dict(),
        {},
        processor=host(lanes),
        threads=threads,
    )
    return torch.from_numpy(engine(images.numpy(), threads)), dict(engine.torch_counts)


@pytest.mark.parametrize(
    ("name", "side", "args"),
    [
        ("cifar_resnet8", 28, {"width": 32, "stem_stride": 2}),
        ("cifar_resnet20", 32, {}),
        ("wrn_16_2", 32, {}),
        ("vgg_c", 32, {}),
        ("resnet50", 64, {}),
        ("mobilenet_v2", 64, {}),
        ("densenet121", 64, {}),
    ],
)
def test_a_network_gives_the_logits_of_torch(name: str, side: int, args: dict[str, Any]) -> None:
    model, ticket = network_ticket(name, args=args, num_classes=10, resolution=side)
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    network = SparseNetwork(ticket)
    with torch.no_grad():
        expected = model(images)
    assert error(network(images), expected) < TOLERANCE
    assert network.on_torch == {}
    assert torch.equal(torch.from_numpy(network(images.numpy())), network(images))
    assert {layer.name for layer in network.layers} >= {key.removesuffix(".weight") for key in ticket.masks}


class Residual(nn.Module):
    """A layer, a sum and an activation, with everything that may stand around a convolution."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut, self.end = layers, shortcut, end

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.end(self.layers(x) + self.shortcut(x)))


def random_network(seed: int) -> tuple[nn.Module, Tensor, str]:
    """Draw a network of a few random layers, images for it, and what to say when it fails."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels = draw.choice((1, 3, 4, 5, 8, 17, 32))
    height, width = draw.randint(1, 21), draw.randint(1, 21)
    images = torch.randn(draw.randint(1, 3), channels, height, width)
    x, layers = images, []
    for _ in range(draw.randint(1, 3)):
        layer = random_layer(draw, x.shape[1], x.shape[2], x.shape[3])
        with torch.no_grad():
            x = layer.eval()(x)
        layers.append(layer)
    if draw.random() < 0.5:
        layers += [nn.AdaptiveAvgPool2d(1)] if draw.random() < 0.5 else []
        layers += [nn.Flatten(), nn.LazyLinear(draw.choice((1, 7, 10, 32))), draw.choice(ACTIVATIONS)()]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model(images)
        for module in model.modules():
            randomize(module, draw)
    return model, images, f"seed {seed}: images {list(images.shape)}, {model}"


def random_layer(draw: random.Random, channels: int, height: int, width: int) -> nn.Module:
    kind = draw.choice(("conv",) * 6 + ("pool", "norm"))
    if kind == "norm":
        return nn.Sequential(nn.BatchNorm2d(channels), draw.choice(ACTIVATIONS)())
    if kind == "pool":
        kernel = draw.randint(1, min(3, height, width))
        options = {"stride": draw.choice((1, 2, kernel)), "padding": draw.randint(0, kernel // 2)}
        pools = (nn.MaxPool2d(kernel, **options, ceil_mode=draw.random() < 0.3), nn.AvgPool2d(kernel, **options))
        return draw.choice((*pools, nn.AvgPool2d(kernel, **options, count_include_pad=False)))
    groups = draw.choice([1, 1, 1] + [g for g in (2, 4, channels) if channels % g == 0])
    outputs = groups * draw.choice((1, 2, 3, 4, 8, 12))
    size = [draw.randint(1, 4), draw.randint(1, 4)]
    dilation = [draw.choice((1, 1, 2)), draw.choice((1, 1, 2))]
    padding = [draw.randint(0, 3), draw.randint(0, 3)]
    for axis, length in enumerate((height, width)):  # something of the image must be left
        while dilation[axis] * (size[axis] - 1) + 1 > length + 2 * padding[axis]:
            size[axis], dilation[axis] = max(1, size[axis] - 1), 1
    stride = (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)))
    conv = nn.Conv2d(
        channels, outputs, tuple(size), stride, tuple(padding), tuple(dilation), groups, draw.random() < 0.5
    )
    norm = nn.BatchNorm2d(outputs) if draw.random() < 0.5 else nn.Identity()
    layers = nn.Sequential(conv, norm)
    if draw.random() < 0.4:
        shortcut = nn.Conv2d(channels, outputs, tuple(size), stride, tuple(padding), tuple(dilation), bias=False)
        return Residual(layers, shortcut, draw.choice(ACTIVATIONS)())
    return nn.Sequential(*layers, draw.choice(ACTIVATIONS)())


def randomize(module: nn.Module, draw: random.Random) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        density = draw.choice((0.0, 0.01, 0.1, 0.5, 1.0))
        weight = torch.randn_like(module.weight) * (torch.rand_like(module.weight) < density)
        module.weight.copy_(weight / max(1.0, weight[0].numel() * density) ** 0.5)
        if module.bias is not None:
            module.bias.normal_()
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 1.5)
        module.weight.normal_()
        module.bias.normal_()


@pytest.mark.parametrize("lanes", LANES)
def test_random_layers_give_what_torch_gives(lanes: int) -> None:
    for seed in range(1000 * lanes, 1000 * lanes + 25):
        model, images, description = random_network(seed)
        with torch.no_grad():
            expected = model(images)
        found, on_torch = run(model, images, lanes=lanes)
        assert error(found, expected) < TOLERANCE, description
        assert not on_torch, description


def test_not_a_number_and_infinity_come_through() -> None:
    model, ticket = network_ticket("cifar_resnet8", args={"width": 8}, num_classes=10, resolution=32, density=0.5)
    network = SparseNetwork(ticket)
    for value in (float("nan"), float("inf"), float("-inf")):
        images = torch.zeros(2, 3, 32, 32)
        images[1, :, 16, 16] = value
        logits = network(images)
        assert torch.isfinite(logits[0]).all()
        assert not torch.isfinite(logits[1]).any(), value
        assert not torch.isfinite(model(images)[1]).any()

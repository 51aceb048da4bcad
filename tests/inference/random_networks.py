"""Small networks of random layers: every operator, odd sizes, strides, groups, densities from 0 to 1."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Hardsigmoid)


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


def in_float64(model: nn.Module, images: Tensor) -> Tensor:
    """Return a network's outputs, computed in float64: torch's own are 1e-4 off where all of them are tiny."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(images.double()).float()


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

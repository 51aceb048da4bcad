"""Outputs are torch's, to 1e-4 of the largest number: networks, and random layers of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.support.samples import network_ticket
from pipeline.inference import SparseNetwork
from pipeline.inference.build import build_engine
from pipeline.inference.jit import host
from tests.inference.random_networks import in_float64, random_network

LANES = (4, 8, 16)
TOLERANCE = 1e-4


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
    network = SparseNetwork(ticket, is_tuned=name == "cifar_resnet20")
    with torch.no_grad():
        expected = model(images)
    assert error(network(images), expected) < TOLERANCE
    assert network.on_torch == {}
    assert torch.equal(torch.from_numpy(network(images.numpy())), network(images))
    assert {layer.name for layer in network.layers} >= {key.removesuffix(".weight") for key in ticket.masks}


@pytest.mark.parametrize("lanes", LANES)
def test_random_layers_give_what_torch_gives(lanes: int) -> None:
    for seed in range(1000 * lanes, 1000 * lanes + 8):
        model, images, description = random_network(seed)
        expected = in_float64(model, images)
        found, on_torch = run(model, images, lanes=lanes)
        assert error(found, expected) < TOLERANCE, description
        assert not on_torch, description


def test_gelu_of_negative_numbers_keeps_its_digits() -> None:
    """There 1 + erf is tiny: a sum would leave few of its digits, as it does in torch."""
    for value in (-1.0, -3.5, -5.0):
        model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.GELU())
        nn.init.ones_(model[0].weight)
        images = torch.full((1, 1, 4, 4), value)
        assert error(run(model.eval(), images)[0], in_float64(model, images)) < 1e-5


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_convolution_whose_strides_leave_one_pixel(side: int, groups: int) -> None:
    """Phase planes and the output may then be single pixels, as in the last layers of MobileNetV2 at 32 pixels."""
    torch.manual_seed(side)
    for stride in (2, 3):
        convolution = nn.Conv2d(8, 16, 3, stride=stride, padding=1, groups=groups)
        for model in (convolution, nn.Sequential(nn.ReLU(), convolution, nn.Sigmoid())):
            images = torch.randn(2, 8, side, side)
            with torch.no_grad():
                expected = model(images)
            assert error(run(model.eval(), images)[0], expected) < TOLERANCE


def test_not_a_number_and_infinity_come_through() -> None:
    model, ticket = network_ticket("cifar_resnet8", args={"width": 8}, num_classes=10, resolution=32, density=0.5)
    network = SparseNetwork(ticket, is_tuned=False)
    for value in (float("nan"), float("inf"), float("-inf")):
        images = torch.zeros(2, 3, 32, 32)
        images[1, :, 16, 16] = value
        logits = network(images)
        assert torch.isfinite(logits[0]).all()
        assert not torch.isfinite(logits[1]).any(), value
        assert not torch.isfinite(model(images)[1]).any()

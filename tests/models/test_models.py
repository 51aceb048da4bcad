from __future__ import annotations

import inspect
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import ConfigError, DataError
from pipeline.models import registry
from pipeline.models.cifar import CIFAR_MODELS
from pipeline.models.names import PAPER_ARGS
from pipeline.sparse.layers import sparse_weights


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# Convolution and linear weights at ten classes, by hand.
VGG_C = (
    9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512 + 2 * 512 * 512)
    + 256**2
    + 2 * 512**2
)
VGG_19 = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2 + 4 * 512**2)
# Basic blocks: the first stage has 6 convolutions; the others one that doubles the width, 2·n − 1
# that keep it and a 1×1 shortcut.
RESNET_34 = (
    9 * 3 * 64
    + 9 * 6 * 64**2
    + sum(9 * (w * w // 2 + (2 * n - 1) * w * w) + w * w // 2 for w, n in ((128, 4), (256, 6), (512, 3)))
)
# Wide blocks: the first of each stage goes from a to b channels with a 1×1 shortcut, the other three keep b.
WRN_28_10 = 9 * 3 * 16 + sum(9 * (a * b + 7 * b * b) + a * b for a, b in ((16, 160), (160, 320), (320, 640)))


@pytest.mark.parametrize(
    ("name", "num_layers", "num_weights"),
    [
        ("vgg_c", 13 + 3, VGG_C + 2048 * 512 + 512 * 512 + 512 * 10),
        ("cifar_vgg19", 16 + 1, VGG_19 + 512 * 10),
        (
            "cifar_resnet50",
            54,
            25_502_912 - 7 * 7 * 3 * 64 + 3 * 3 * 3 * 64 - 2048 * 990,
        ),  # ResNet-50 with another stem and classifier
        ("cifar_resnet34", 1 + 2 * (3 + 4 + 6 + 3) + 3 + 1, RESNET_34 + 512 * 10),
        ("wrn_28_10", 1 + 24 + 3 + 1, WRN_28_10 + 640 * 10),
    ],
)
def test_the_papers_networks(name: str, num_layers: int, num_weights: int) -> None:
    model = models.outline(name, num_classes=10)
    weights = sparse_weights(model)
    assert len(weights) == num_layers
    assert sum(weight.numel() for weight in weights.values()) == num_weights
    assert models.image_size(name) == 32


@pytest.mark.parametrize("name", sorted(CIFAR_MODELS))
def test_cifar_networks_learn_from_images_of_32_pixels(name: str) -> None:
    model = models.outline(name, num_classes=10).train()
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", sorted(CIFAR_MODELS))
def test_the_arguments_that_the_configuration_knows_are_those_of_the_builders(name: str) -> None:
    assert ("num_classes", *PAPER_ARGS.get(name, ())) == tuple(inspect.signature(CIFAR_MODELS[name]).parameters)


def test_vgg_c_runs_as_it_is_described() -> None:
    model = models.build("vgg_c", num_classes=10)
    logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    features = [module for module in model.features if isinstance(module, nn.Conv2d)]
    assert [c.kernel_size[0] for c in features] == [3, 3, 3, 3, 3, 3, 1, 3, 3, 1, 3, 3, 1]


def test_equal_seeds_give_equal_networks_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = models.build("vgg_c", num_classes=10, seed=3)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    second, third = models.build("vgg_c", num_classes=10, seed=3), models.build("vgg_c", num_classes=10, seed=4)
    name = "classifier.6.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], third.state_dict()[name])


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet8",
        "resnet18",
        "regnet_y_400mf",
        "swin_t",
        "timm/vit_tiny_patch16_224",
        "timm/vit_small_resnet26d_224",
    ],
)
def test_an_outline_is_the_network_without_its_weights(name: str) -> None:
    outline = models.outline(name, num_classes=7)
    assert shapes(outline) == shapes(models.build(name, num_classes=7))
    assert {tensor.device.type for tensor in outline.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_training_gives_one_tensor(name: str) -> None:
    size = models.image_size(name)
    assert isinstance(models.outline(name).train()(torch.empty(2, 3, size, size, device="meta")), Tensor)


def test_image_sizes() -> None:
    sizes = {name: models.image_size(name) for name in registry.names()}
    assert {size for name, size in sizes.items() if name in CIFAR_MODELS} == {32}
    assert sizes["inception_v3"] == 299
    assert {size for name, size in sizes.items() if name not in {*CIFAR_MODELS, "inception_v3"}} == {224}
    assert models.image_size("timm/vit_base_patch16_384") == 384


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet5O", "resnet50"),
        ("wrn_28_1O", "wrn_28_10"),
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
        ("timm/vit_tny_patch16_224", "timm/vit_tiny_patch16_224"),
        ("timm/hf-hub:someone/something", "cifar_resnet8"),
        ("?", "cifar_resnet8"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a model of pipeline\.models, torchvision or timm") as error:
        models.build(name)
    assert hint in error.value.do


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="needs timm, which is not installed") as error:
        models.build("timm/resnet50")
    assert error.value.do == "python -m pip install timm"
    with pytest.raises(ConfigError, match="is not a model"):
        models.build("resnet5O")


@pytest.mark.parametrize("name", ["resnet50", "cifar_resnet50"])
def test_without_torchvision_the_small_networks_are_left(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match="needs torchvision, which is not installed"):
        models.build(name)
    assert models.build("wrn_16_2", num_classes=10)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet50", {"num_layers": 3}),
        ("resnet50", {"weights": "DEFAULT"}),  # published weights are no fresh initialisation
        ("timm/resnet50", {"pretrained": True}),
        ("timm/resnet50", {"checkpoint_path": "/etc/passwd"}),
        ("timm/resnet50", {"pretrained_cfg": {"file": "/etc/passwd"}}),
        ("timm/resnet50", {"cache_dir": "/tmp"}),
        ("vit_b_16", {"image_size": 225}),
        ("vit_b_16", {"num_layers": 10**15, "hidden_dim": -64}),
        ("vgg_c", {"width": 8}),
    ],
)
def test_arguments_that_a_network_does_not_take_are_refused(name: str, args: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"model.args: {name}"):
        models.build(name, args=args)


def test_a_network_is_built_for_the_tensors_that_belong_into_it() -> None:
    args = {"width": 4}
    fitting = shapes(models.build("cifar_resnet8", num_classes=10, args=args))
    assert shapes(models.build_for(fitting, "cifar_resnet8", num_classes=10, args=args, whose="ticket 0")) == fitting
    short = {name: shape for name, shape in fitting.items() if name != "fc.bias"}
    with pytest.raises(
        DataError,
        match=r"ticket 0 does not fit cifar_resnet8: "
        r"fc.bias is of shape \[10\] in the network, but missing in the file",
    ):
        models.build_for(short, "cifar_resnet8", num_classes=10, args=args, whose="ticket 0")
    with pytest.raises(DataError, match=r"other is missing in the network, but of shape \[3\] in the file"):
        models.build_for(fitting | {"other": (3,)}, "cifar_resnet8", num_classes=10, args=args, whose="ticket 0")


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("cifar_resnet8", {"width": 70_000}, DataError),  # of terabytes
        ("cifar_resnet8", {"width": 10**18}, ConfigError),
        ("vit_b_16", {"num_layers": 10**9}, ConfigError),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 60_000}, DataError),
        ("timm/vit_tiny_patch16_224", {"depth": 10_000}, ConfigError),  # of a hundred thousand small tensors
        ("timm/vit_tiny_patch16_224", {"depth": 10**9}, ConfigError),
        ("timm/convnext_tiny", {"depths": [3, 10**9, 3, 3]}, ConfigError),
        ("timm/resnet50", {"checkpoint_path": "/etc/passwd"}, ConfigError),
    ],
)
def test_what_a_ticket_asks_for_costs_nothing_before_it_fits(
    name: str, args: dict[str, object], error: type[Exception]
) -> None:
    given = shapes(models.outline("cifar_resnet8", num_classes=10))
    with pytest.raises(error, match=r"ticket 0 does not fit|model\.args: "):
        models.build_for(given, name, num_classes=10, args=args, whose="ticket 0")


def test_arguments_reach_the_network() -> None:
    vit = models.outline("vit_b_16", args={"image_size": 384})
    assert math.isqrt(vit.state_dict()["encoder.pos_embedding"].shape[1] - 1) == 384 // 16
    assert "aux1.fc1.weight" in models.outline("googlenet", args={"aux_logits": True}).state_dict()

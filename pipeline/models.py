"""Networks by name: torchvision's, and the small ones of the papers' CIFAR experiments."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a shortcut (post-activation)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class PreactivationBlock(nn.Module):
    """The block of wide residual networks: BN–ReLU–conv twice (arXiv 1605.07146)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        is_same = stride == 1 and num_in == num_out
        self.shortcut: nn.Module | None = None if is_same else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        return torch.as_tensor(out + (x if self.shortcut is None else self.shortcut(activated)))


class SmallResNet(nn.Module):
    """Residual network for images of 28 or 32 pixels: a 3×3 stem and three stages of ``num_blocks`` blocks.

    ``stem_stride`` 2 quarters the work for simple images.
    """

    def __init__(
        self, *, num_blocks: int, widths: tuple[int, int, int], num_classes: int, stem_stride: int, is_preactivation: bool
    ) -> None:
        super().__init__()
        block = PreactivationBlock if is_preactivation else BasicBlock
        num_stem = 16 if is_preactivation else widths[0]
        self.stem = nn.Conv2d(3, num_stem, 3, stem_stride, 1, bias=False)
        self.stem_bn: nn.Module = nn.Identity() if is_preactivation else nn.BatchNorm2d(num_stem)
        blocks: list[nn.Module] = []
        num_in = num_stem
        for stage, width in enumerate(widths):
            for index in range(num_blocks):
                blocks.append(block(num_in, width, 2 if stage > 0 and index == 0 else 1))
                num_in = width
        self.blocks = nn.Sequential(*blocks)
        self.last_bn: nn.Module = nn.BatchNorm2d(num_in) if is_preactivation else nn.Identity()
        self.is_preactivation = is_preactivation
        self.fc = nn.Linear(num_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, h, w] -> logits [n, classes]."""
        x = self.stem_bn(self.stem(x))
        x = self.blocks(x if self.is_preactivation else torch.relu(x))
        x = torch.relu(self.last_bn(x)) if self.is_preactivation else x
        return torch.as_tensor(self.fc(x.mean(dim=(2, 3))))


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    def build(num_classes: int, width: int = 16, stem_stride: int = 1) -> nn.Module:
        widths = (width, 2 * width, 4 * width)
        return SmallResNet(
            num_blocks=(depth - 2) // 6, widths=widths, num_classes=num_classes, stem_stride=stem_stride, is_preactivation=False
        )

    return build


def _wide_resnet(depth: int, factor: int) -> Callable[..., nn.Module]:
    def build(num_classes: int) -> nn.Module:
        widths = (16 * factor, 32 * factor, 64 * factor)
        return SmallResNet(num_blocks=(depth - 4) // 6, widths=widths, num_classes=num_classes, stem_stride=1, is_preactivation=True)

    return build


SMALL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet8": _cifar_resnet(8),
    "cifar_resnet20": _cifar_resnet(20),
    "cifar_resnet56": _cifar_resnet(56),
    "wrn_28_10": _wide_resnet(28, 10),
    "wrn_16_2": _wide_resnet(16, 2),
}


def build(name: str, *, num_classes: int = 1000, args: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A freshly initialised network: equal for equal ``seed``, whatever was drawn before.

    Raises:
        ConfigError: for an unknown name or arguments that the network does not take.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if name in SMALL_MODELS:
                return SMALL_MODELS[name](num_classes, **(args or {}))
            import torchvision.models

            known = torchvision.models.list_models(module=torchvision.models)
            if name not in known:
                close = difflib.get_close_matches(name, [*SMALL_MODELS, *known], n=3) or sorted(SMALL_MODELS)
                raise ConfigError(f"model.name: {name!r} is no model of torchvision or of pipeline.models", do=f"choose {', '.join(close)}")
            model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **(args or {}))
            assert isinstance(model, nn.Module)
            return model
        except TypeError as error:
            raise ConfigError(f"model.args: {error}", do="give the arguments that this model takes") from error

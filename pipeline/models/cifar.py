"""The networks of the papers' CIFAR experiments, for images of 32 pixels.

:mod:`pipeline.models.registry` builds them by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def _initialise_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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
        """Map [n, num_in, h, w] to [n, num_out, h / stride, w / stride]."""
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
        """Map [n, num_in, h, w] to [n, num_out, h / stride, w / stride]."""
        activated = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        return torch.as_tensor(out + (x if self.shortcut is None else self.shortcut(activated)))


class SmallResNet(nn.Module):
    """Residual network for images of 28 or 32 pixels: a 3×3 stem and three stages of ``num_blocks`` blocks.

    A ``stem_stride`` of 2 divides the work by four, for simple images.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        widths: tuple[int, int, int],
        num_classes: int,
        stem_stride: int,
        is_preactivation: bool,
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
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 3, h, w] to logits [n, classes]."""
        x = self.stem_bn(self.stem(x))
        x = self.blocks(x if self.is_preactivation else torch.relu(x))
        x = torch.relu(self.last_bn(x)) if self.is_preactivation else x
        return torch.as_tensor(self.fc(x.mean(dim=(2, 3))))


def _small_resnet(depth: int) -> Callable[..., nn.Module]:
    def build(num_classes: int, width: int = 16, stem_stride: int = 1) -> nn.Module:
        widths = (width, 2 * width, 4 * width)
        return SmallResNet(
            num_blocks=(depth - 2) // 6,
            widths=widths,
            num_classes=num_classes,
            stem_stride=stem_stride,
            is_preactivation=False,
        )

    return build


def _wide_resnet(depth: int, factor: int) -> Callable[..., nn.Module]:
    def build(num_classes: int) -> nn.Module:
        widths = (16 * factor, 32 * factor, 64 * factor)
        return SmallResNet(
            num_blocks=(depth - 4) // 6, widths=widths, num_classes=num_classes, stem_stride=1, is_preactivation=True
        )

    return build


def _large_resnet(name: str) -> Callable[..., nn.Module]:
    """Return a builder of the ImageNet network ``name`` for small images.

    It has a 3×3 stem of stride 1 and no max-pool, as in the CIFAR code of ITOP and GraNet.
    """

    def build(num_classes: int) -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights=None, num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model

    return build


def _vgg_features(kernel_sizes: Sequence[Sequence[int]], *, bias: bool) -> nn.Sequential:
    """Build five stages that map images to [n, 512, h, w].

    A stage is one conv–BN–ReLU for each of its kernel sizes, followed by a max-pool.
    """
    layers: list[nn.Module] = []
    num_in = 3
    for width, stage in zip((64, 128, 256, 512, 512), kernel_sizes, strict=True):
        for kernel_size in stage:
            layers += [
                nn.Conv2d(num_in, width, kernel_size, padding=1, bias=bias),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            num_in = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg_c(num_classes: int) -> nn.Module:
    """VGG-C of SNIP (arXiv 1810.02340), as in the code of SNFS (arXiv 1907.04840) and ITOP (arXiv 2102.02887).

    It has thirteen convolutions, of which the last one of each of the three later stages is 1×1,
    and three linear layers with batch normalisation in place of dropout. That code pads the 1×1
    convolutions by 1 as well, so that an image of 32 pixels leaves 2×2 positions for the classifier
    instead of one (2048 inputs, 11.3 million weights instead of SNIP's 10.5). The same is done here,
    because the published numbers are those of this network.
    """
    features = _vgg_features([(3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)], bias=True)
    hidden = [[nn.Linear(num_in, 512), nn.ReLU(inplace=True), nn.BatchNorm1d(512)] for num_in in (4 * 512, 512)]
    classifier = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(512, num_classes))
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def cifar_vgg19(num_classes: int) -> nn.Module:
    """VGG-19 with batch normalisation and a single linear layer.

    GraNet (arXiv 2106.10404) and GraSP (arXiv 2002.07376) train this network.
    """
    features = _vgg_features([(3,) * 2, (3,) * 2, (3,) * 4, (3,) * 4, (3,) * 4], bias=False)
    _initialise_convolutions(features)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        OrderedDict(features=features, pool=pool, flatten=nn.Flatten(), classifier=nn.Linear(512, num_classes))
    )


IMAGE_SIZE = 32  # pixels
CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet8": _small_resnet(8),
    "cifar_resnet20": _small_resnet(20),
    "cifar_resnet56": _small_resnet(56),
    "cifar_resnet34": _large_resnet("resnet34"),
    "cifar_resnet50": _large_resnet("resnet50"),
    "wrn_28_10": _wide_resnet(28, 10),
    "wrn_16_2": _wide_resnet(16, 2),
    "vgg_c": vgg_c,
    "cifar_vgg19": cifar_vgg19,
}

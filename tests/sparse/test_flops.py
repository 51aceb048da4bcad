from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline import models
from pipeline.sparse.flops import (
    dense_flops,
    flops_at,
    layer_macs,
    rigl_flops_per_sample,
    snfs_flops_per_sample,
    sparse_flops,
)


class Tokens(nn.Module):
    """Turns an image [n, c, h, w] into h·w tokens [n, h·w, c]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def test_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),  # 8·2·3·3 = 144 weights, 6×6 positions
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),  # depthwise: 72 weights, 3×3 positions
        nn.Conv2d(8, 5, 1),  # 40 weights, 3×3 positions
        nn.Flatten(2),
        nn.Conv1d(5, 2, 3),  # 30 weights, 7 positions
    )
    assert layer_macs(model, (4, 6, 6)) == {
        "0.weight": 144 * 36,
        "1.weight": 72 * 9,
        "2.weight": 40 * 9,
        "4.weight": 30 * 7,
    }


def test_a_linear_layer_counts_for_every_token() -> None:
    model = nn.Sequential(Tokens(), nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    assert layer_macs(model, (3, 2, 4)) == {"1.weight": 15 * 8, "2.weight": 10 * 8}


class Attention(nn.Module):
    """Attention over the tokens of an image; keys are the tokens, or means of half the width."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.tokens = Tokens()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)

    def forward(self, x: Tensor) -> Tensor:
        asking = self.tokens(x)
        answering = asking[:, :3, :4] if self.attention.in_proj_weight is None else asking
        output: Tensor = self.attention(asking, answering, answering)[0]
        return output


@pytest.mark.parametrize("is_training", [False, True])
def test_attention_projections_by_hand(is_training: bool) -> None:
    macs = layer_macs(Attention().train(is_training), (8, 5, 1))
    assert macs == {"attention.in_proj_weight": 24 * 8 * 5, "attention.out_proj.weight": 8 * 8 * 5}
    macs = layer_macs(Attention(kdim=4, vdim=4).train(is_training), (8, 5, 1))  # five queries, three keys of width 4
    assert macs == {
        "attention.q_proj_weight": 8 * 8 * 5,
        "attention.k_proj_weight": 8 * 4 * 3,
        "attention.v_proj_weight": 8 * 4 * 3,
        "attention.out_proj.weight": 8 * 8 * 5,
    }


def test_a_fused_encoder_layer_hides_nothing() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    macs = layer_macs(nn.Sequential(Tokens(), encoder.eval()), (8, 5, 1))
    for block in (0, 1):
        of_block = {
            name.split(f"layers.{block}.")[1]: count for name, count in macs.items() if f"layers.{block}." in name
        }
        assert of_block == {
            "self_attn.in_proj_weight": 24 * 8 * 5,
            "self_attn.out_proj.weight": 8 * 8 * 5,
            "linear1.weight": 8 * 16 * 5,
            "linear2.weight": 16 * 8 * 5,
        }
    assert len(macs) == 8


class Unusual(nn.Module):
    """Weights that are not used by calling their module: by a function (swin), standardised, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1, 4, 1, 1)  # a tensor that no module knows of
        self.conv = Standardised(4, 4, 3, padding=1)
        self.tokens = Tokens()
        self.qkv = nn.Linear(4, 12)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.conv(x * self.scale))
        output: Tensor = self.second(self.first(F.linear(x, self.qkv.weight)))
        return output


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias, padding=1)


def test_weights_count_however_they_are_used() -> None:
    model = Unusual()
    # 144 convolution weights at 9 positions; 9 tokens; the shared 12×12 weight twice, under its first name
    assert layer_macs(model, (4, 3, 3)) == {"conv.weight": 144 * 9, "qkv.weight": 48 * 9, "first.weight": 2 * 144 * 9}


def test_the_model_is_left_as_it_was() -> None:
    model = Unusual().train()
    before = dict(model.named_parameters())
    layer_macs(model, (4, 3, 3))
    assert all(
        parameter is before[name] and parameter.device.type == "cpu" for name, parameter in model.named_parameters()
    )
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert model.scale.device.type == "cpu"


def test_vit_b_16_by_hand() -> None:
    macs = layer_macs(models.outline("vit_b_16"), (3, 224, 224))
    patches, tokens, width = 14 * 14, 14 * 14 + 1, 768
    block = "encoder.layers.encoder_layer_11."
    assert macs["conv_proj.weight"] == 3 * 16 * 16 * width * patches
    assert macs[f"{block}self_attention.in_proj_weight"] == 3 * width * width * tokens
    assert macs[f"{block}self_attention.out_proj.weight"] == width * width * tokens
    assert macs[f"{block}mlp.0.weight"] == macs[f"{block}mlp.3.weight"] == 4 * width * width * tokens
    assert macs["heads.head.weight"] == width * 1000
    assert (
        sum(macs.values()) == 768 * width * patches + 12 * 12 * width * width * tokens + width * 1000 == 16_848_500_736
    )


@pytest.mark.parametrize(
    "name", ["resnet50", "resnext50_32x4d", "mobilenet_v3_small", "vit_b_16", "swin_t", "swin_v2_t", "wrn_28_10"]
)
def test_sums_agree_with_the_counter_of_torch(name: str) -> None:
    model, size = models.outline(name), models.image_size(name)
    macs = layer_macs(model, (3, size, size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    # attention's own products are bmm and scaled_dot_product_attention
    assert dense_flops(macs) == sum(counted.get(f"aten.{operation}", 0) for operation in ("convolution", "mm", "addmm"))


def test_flops_of_masks_by_hand() -> None:
    macs = {"a": 100, "b": 10}
    masks = {"a": torch.tensor([True, False, False, False])}
    assert dense_flops(macs) == 220
    assert sparse_flops(macs, masks) == flops_at(macs, {"a": 0.25}) == 2 * (25 + 10)
    assert rigl_flops_per_sample(1, 10, 4) == pytest.approx((4 * 3 + 2 + 10) / 5)
    assert snfs_flops_per_sample(1, 10) == 12

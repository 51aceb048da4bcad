from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.errors import ConfigError
from pipeline.sparse.layers import sparse_weights


class Everything(nn.Module):
    """Common layers, and matrices that are not sparse. The other layers: tests/sparse/test_layer_kinds.py."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.conv2 = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv3d(2, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.embedding = nn.Embedding(3, 8)
        self.up = nn.ConvTranspose2d(2, 4, 3)
        self.linear = nn.Linear(8, 3)


def test_layers_are_found_by_type_in_the_order_of_the_parameters() -> None:
    weights = sparse_weights(Everything())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "conv1.weight": (4, 2, 3),
        "conv2.weight": (4, 2, 3, 3),
        "conv3.weight": (4, 2, 3, 3, 3),
        "attention.in_proj_weight": (24, 8),
        "attention.out_proj.weight": (8, 8),
        "cross.q_proj_weight": (8, 8),
        "cross.k_proj_weight": (8, 6),
        "cross.v_proj_weight": (8, 4),
        "cross.out_proj.weight": (8, 8),
        "up.weight": (2, 4, 3, 3),
        "linear.weight": (3, 8),
    }
    assert list(weights) == [name for name, _ in Everything().named_parameters() if name in weights]


def test_a_shared_weight_comes_once_under_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert list(sparse_weights(model)) == ["0.weight", "2.weight"]


def test_a_vision_transformer_is_sparse_throughout() -> None:
    model = models.outline("vit_b_16")
    weights = sparse_weights(model)
    width, hidden = 768, 3072
    per_block = 3 * width**2 + width**2 + 2 * width * hidden
    assert len(weights) == 1 + 12 * 4 + 1
    assert (
        sum(weight.numel() for weight in weights.values())
        == 16 * 16 * 3 * width + 12 * per_block + width * 1000
        == 86_292_480
    )
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert matrices - set(weights) == {"class_token", "encoder.pos_embedding"}


def test_layers_kept_dense_by_name() -> None:
    left = sparse_weights(Everything(), ["*attention*", "conv?.weight", "cross.*", "up.*"])
    assert list(left) == ["linear.weight"]
    with pytest.raises(ConfigError, match=r"none of the 11 weights that can be sparse matches 'position'") as error:
        sparse_weights(Everything(), ["position"])
    assert error.value.do == "choose among conv1.weight, conv2.weight, conv3.weight, …, up.weight, linear.weight"

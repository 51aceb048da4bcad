from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sparse.select import key_of, keyed_hash
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, parse_structure
from pipeline.sparse.structure import Layout, first_of_units, mean_of_units, structured_masks
from pipeline.sparse.update import prune_and_regrow

SHAPES = [(8, 12), (4, 8, 3, 3), (12, 4, 1, 1)]
STRUCTURES = ["none", "fan_in", "2:4", "1:4", "block 2x2", "block 4x4"]


def assert_structure(mask: Tensor, structure: str) -> None:
    kind, first, second = parse_structure(structure)
    if kind == "n:m":
        groups = mask.movedim(1, -1).reshape(
            -1, second
        )  # inputs that follow each other, at one output and kernel position
        assert (groups.sum(1) == first).all()
    if kind == "fan_in":
        assert mask.reshape(len(mask), -1).sum(1).unique().numel() == 1
    if kind == "block":
        for row in range(0, mask.shape[0], first):
            for column in range(0, mask.shape[1], second):
                block = mask[row : row + first, column : column + second].reshape(first * second, -1)
                assert (block == block[0]).all()


@pytest.mark.parametrize("text", ["2:", "5:4", "0:4", "block 4", "block 0x4", "fanin", ""])
def test_an_unknown_structure_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not one of|would keep"):
        parse_structure(text)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_units_go_there_and_back(shape: tuple[int, ...], structure: str) -> None:
    layout = Layout(shape, structure)
    assert layout.unsupported_reason() == ""
    units = torch.rand(layout.num_units) < 0.5
    assert torch.equal(layout.to_units(layout.to_mask(units), first_of_units), units)
    assert layout.num_units * layout.unit_size == math.prod(shape)


def test_groups_and_blocks_by_hand() -> None:
    weight = torch.arange(16.0).view(4, 4)
    assert Layout((4, 4), "block 2x2").to_units(weight, mean_of_units).tolist() == [
        2.5,
        4.5,
        10.5,
        12.5,
    ]  # (0+1+4+5)/4, …
    kernel = torch.arange(8.0).view(1, 4, 1, 2)  # inputs 0–3 at kernel position 0 are 0, 2, 4, 6
    assert Layout((1, 4, 1, 2), "2:4").to_units(kernel, mean_of_units).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    mask = structured_masks(kernel, Layout((1, 4, 1, 2), "2:4"), 4)
    assert mask.flatten().int().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # the two largest of each group: 4, 6 and 5, 7
    assert "3 inputs are not a multiple of 4" in Layout((8, 3, 3, 3), "2:4").unsupported_reason()
    assert "4×6" in Layout((4, 6), "block 4x4").unsupported_reason()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_update_keeps_counts_and_structure(data: st.DataObject) -> None:
    structure = data.draw(st.sampled_from(STRUCTURES))
    scope = data.draw(st.sampled_from(["layer", "global_prune"]))
    masks, weights, first, second = {}, {}, {}, {}
    for layer, shape in enumerate(data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))):
        name, layout = f"l{layer}", Layout(shape, structure)
        hashes = keyed_hash(key_of(data.draw(st.integers(0, 99)), layer), math.prod(shape))
        masks[name] = structured_masks(hashes, layout, layout.num_active(data.draw(st.integers(1, math.prod(shape)))))
        levels = data.draw(st.sampled_from([1, 3, 1000]))  # all equal, ties, hardly a tie
        weights[name] = ((hashes % levels).float() + 1).view(shape) * masks[name]
        first[name], second[name] = (hashes % 7).float(), hashes
    growth = [(first, 0.5), (second, 1.0)] if data.draw(st.booleans()) else [(second, 1.0)]
    new = prune_and_regrow(
        masks, weights, growth, drop_fraction=data.draw(st.floats(0, 1)), scope=scope, structure=structure
    )
    for name, mask in masks.items():
        assert_structure(mask, structure)
        assert_structure(new[name], structure)
        assert int(new[name].sum()) == int(mask.sum())


@pytest.mark.parametrize("method", ["static", "set_itop", "rigl", "mixed"])
@pytest.mark.parametrize("structure", STRUCTURES[1:])
def test_training_keeps_the_structure(structure: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8)).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"structure": structure, "distribution": "uniform"}
    density = {"2:4": 0.5, "1:4": 0.25}.get(structure, 0.3)
    sparsifier = Sparsifier(
        model, optimizer, dataclasses.replace(METHODS[method], **options), density=density, seed=0, check_every=1
    )
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for _ in range(4):
        model(torch.randn(2, 4, 4, 4)).square().mean().backward()
        assert sparsifier.before_step(0.5)
        optimizer.step()
        sparsifier.after_step()
        for name, mask in sparsifier.masks.items():
            assert_structure(mask, structure)
            assert int(mask.sum()) == int(before[name].sum())
    assert (method == "static") == all(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())


def test_a_layer_that_does_not_fit_is_named_with_what_to_write() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 10))
    strategy = dataclasses.replace(METHODS["static"], structure="2:4", distribution="uniform")
    with pytest.raises(ConfigError, match=r"0.weight: 3 inputs are not a multiple of 4.*dense_layers: \[0.weight\]"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), strategy, density=0.5, seed=0)

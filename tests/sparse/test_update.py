from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sparse.update import magnitude_masks, num_to_prune, prune_and_regrow


def bits(mask: Tensor) -> list[int]:
    return mask.int().flatten().tolist()


def test_one_layer_by_hand() -> None:
    mask = {"w": torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)}
    weights = {"w": torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 0.0]).abs()}
    gradient = {"w": torch.tensor([9.0, 9.0, 9.0, 5.0, 1.0, 7.0])}
    # p = 0.5 of 4: weights 1 and 3 are pruned (|1|, |2|); of 1, 3, 4, 5 the largest gradients are 1 (9) and 5 (7).
    assert bits(prune_and_regrow(mask, weights, gradient, drop_fraction=0.5, scope="layer")["w"]) == [1, 1, 1, 0, 0, 1]


def test_ties_keep_the_lower_index_when_pruning_and_grow_it() -> None:
    mask = {"w": torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)}
    scores = {"w": torch.ones(6)}
    growth = {"w": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])}
    # ceil(0.5·3) = 2 are pruned, the higher indices 1 and 2; of the equal candidates 3, 4, 5 the first two grow.
    assert bits(prune_and_regrow(mask, scores, growth, drop_fraction=0.5, scope="layer")["w"]) == [1, 0, 0, 1, 1, 0]


def test_global_scope_ranks_all_layers_and_spares_the_minimum() -> None:
    masks = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, True, False, False])}
    weights = {"a": torch.tensor([0.1, 0.2, 0.0, 0.0]), "b": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    growth = {"a": torch.zeros(4), "b": torch.tensor([0.0, 0.0, 5.0, 6.0])}
    new = prune_and_regrow(masks, weights, growth, drop_fraction=0.5, scope="global", min_active=0)
    assert (bits(new["a"]), bits(new["b"])) == ([0, 0, 0, 0], [1, 1, 1, 1])  # layer a dies
    new = prune_and_regrow(masks, weights, growth, drop_fraction=0.5, scope="global", min_active=1)
    assert (bits(new["a"]), bits(new["b"])) == ([0, 1, 0, 0], [0, 1, 1, 1])  # a keeps its strongest; b loses its weakest in its place


def test_counts_follow_ceil_of_the_real_product() -> None:
    assert num_to_prune(0.3, 10) == 3
    assert num_to_prune(0.07, 100) == 7  # 0.07·100 is 7.000000000000001 in floating point
    assert num_to_prune(0.31, 10) == 4
    assert num_to_prune(1.0, 5) == 5
    assert num_to_prune(0.0, 5) == 0


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_update_keeps_the_number_of_active_weights(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    scope = data.draw(st.sampled_from(["layer", "global"]))
    drop_fraction = data.draw(st.floats(0.01, 1.0))
    few_values = st.integers(0, 2).map(float)  # many ties
    masks, weights, growth = {}, {}, {}
    for layer, size in enumerate(sizes):
        name = f"l{layer}"
        masks[name] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        weights[name] = torch.tensor(data.draw(st.lists(few_values, min_size=size, max_size=size))) * masks[name]
        growth[name] = torch.tensor(data.draw(st.lists(few_values, min_size=size, max_size=size)))
    new = prune_and_regrow(masks, weights, growth, drop_fraction=drop_fraction, scope=scope, min_active=1)
    assert sum(int(m.sum()) for m in new.values()) == sum(int(m.sum()) for m in masks.values())
    for name, mask in masks.items():
        before, after = int(mask.sum()), int(new[name].sum())
        if scope == "layer":
            assert after == before
            num_kept = int((mask & new[name]).sum())
            assert num_kept >= before - math.ceil(drop_fraction * before)
        else:
            assert after >= min(1, before)


def test_a_dense_layer_has_nothing_to_regrow() -> None:
    mask = {"w": torch.ones(5, dtype=torch.bool)}
    assert bits(prune_and_regrow(mask, {"w": torch.arange(5.0)}, {"w": torch.rand(5)}, drop_fraction=0.4, scope="layer")["w"]) == [1] * 5


@pytest.mark.parametrize(("num_active", "expected"), [(3, [[1, 0], [1, 1]]), ({"a": 2, "b": 1}, [[1, 1], [1, 0]])])
def test_magnitude_masks(num_active: int | dict[str, int], expected: list[list[int]]) -> None:
    weights = {"a": torch.tensor([-3.0, 0.5]), "b": torch.tensor([2.0, -2.0])}
    assert [bits(mask) for mask in magnitude_masks(weights, num_active).values()] == expected

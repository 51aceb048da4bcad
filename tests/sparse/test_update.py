from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.sparse.criteria import GrowthStage, sign_aware
from pipeline.sparse.request import Request
from pipeline.sparse.select import key_of, keyed_hash
from pipeline.sparse.strategy import METHODS, SCOPES
from pipeline.sparse.update import (
    grow_to,
    magnitude_masks,
    prune_and_regrow,
    prune_to,
    reallocated,
    share_of,
    updated_masks,
)


def bits(mask: Tensor) -> list[int]:
    return mask.int().flatten().tolist()


def mask_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def update(
    masks: dict[str, Tensor], weights: dict[str, Tensor], scores: dict[str, Tensor], drop: float, **options: object
) -> dict[str, list[int]]:
    growth = [({name: score.clone() for name, score in scores.items()}, 1.0)]
    return {
        name: bits(mask)
        for name, mask in prune_and_regrow(masks, weights, growth, drop_fraction=drop, **options).items()
    }  # type: ignore[arg-type]


def test_one_layer_by_hand() -> None:
    mask = {"w": mask_of(1, 1, 1, 1, 0, 0)}
    weights = {"w": torch.tensor([4.0, 1.0, -3.0, 2.0, 0.0, 0.0])}
    gradient = {"w": torch.tensor([9.0, 9.0, 9.0, 5.0, 1.0, 7.0])}
    # p = 0.5 of 4: weights 1 and 3 are pruned (|1|, |2|); of 1, 3, 4, 5 the largest gradients are 1 (9) and 5 (7).
    assert update(mask, weights, gradient, 0.5)["w"] == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("regrown", "restarted"), [("kept", None), ("zero", [0, 1, 1, 0, 0, 0]), ("zero_density", [0, 1, 0, 0, 0, 0])]
)
def test_what_restarts_by_hand(regrown: str, restarted: list[int] | None) -> None:
    mask = {"w": mask_of(1, 1, 1, 1, 1, 0)}
    weights = {"w": torch.tensor([5.0, 1.0, -3.0, 4.0, 2.0, 0.0])}
    growth = [GrowthStage({"w": torch.tensor([0.0, 9.0, 8.0, 7.0, 0.0, 0.0])}, 1.0)]
    strategy = dataclasses.replace(METHODS["granet"], regrown=regrown)
    # 5 become 4: the density prunes 1 (|1|). Of those, p = 0.5 prunes 4 (|2|) and 2 (|−3|). By gradient grow 1 (9),
    # which the density had pruned, and 2 (8), which p had; 0 and 3 were never pruned, 4 stays pruned.
    updated = updated_masks(mask, weights, Request(0.5, 4), growth, strategy=strategy, num_active_before=5)
    assert bits(updated.masks["w"]) == [1, 1, 1, 1, 0, 0]
    assert {n: bits(mark) for n, mark in updated.restarted.items()} == ({} if restarted is None else {"w": restarted})


def test_ties_keep_the_lower_index_when_pruning_and_grow_it() -> None:
    mask = {"w": mask_of(1, 1, 1, 0, 0, 0)}
    growth = {"w": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])}
    # ceil(0.5·3) = 2 are pruned, the higher indices 1 and 2; of the equal candidates 3, 4, 5 the first two grow.
    assert update(mask, {"w": torch.ones(6)}, growth, 0.5)["w"] == [1, 0, 0, 1, 1, 0]


def test_global_scope_ranks_all_layers_and_spares_the_minimum() -> None:
    masks = {"a": mask_of(1, 1, 0, 0), "b": mask_of(1, 1, 0, 0)}
    weights = {"a": torch.tensor([0.1, 0.2, 0.0, 0.0]), "b": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    growth = {"a": torch.zeros(4), "b": torch.tensor([0.0, 0.0, 5.0, 6.0])}
    assert update(masks, weights, growth, 0.5, scope="global", min_active=0) == {
        "a": [0, 0, 0, 0],
        "b": [1, 1, 1, 1],
    }  # layer a dies
    # a keeps its strongest; b loses its weakest in its place
    assert update(masks, weights, growth, 0.5, scope="global", min_active=1) == {"a": [0, 1, 0, 0], "b": [0, 1, 1, 1]}


def test_global_normalised_scope_takes_the_scale_of_layers_away() -> None:
    masks = {"a": mask_of(1, 1, 0, 0), "b": mask_of(1, 1, 0, 0)}
    weights = {"a": torch.tensor([1.0, 3.0, 0.0, 0.0]), "b": torch.tensor([100.0, 100.0, 0.0, 0.0])}
    growth = {"a": torch.tensor([0.0, 0.0, 3.0, 1.0]), "b": torch.tensor([0.0, 0.0, 100.0, 100.0])}
    # Pruning, over the means 2 and 100: a 0.5, 1.5; b 1, 1: a's first goes.
    # Growth, over the means 1 and 50: a 3, 1; b 2, 2: a's third comes.
    assert update(masks, weights, growth, 0.25, scope="global_normalised", min_active=0) == {
        "a": [0, 1, 1, 0],
        "b": [1, 1, 0, 0],
    }
    # The raw ranking prunes the same one and grows in b, whose gradients are larger.
    assert update(masks, weights, growth, 0.25, scope="global", min_active=0) == {"a": [0, 1, 0, 0], "b": [1, 1, 1, 0]}


def test_global_prune_scope_regrows_in_each_layer_what_it_lost() -> None:
    masks = {"a": mask_of(1, 1, 0, 0), "b": mask_of(1, 1, 0, 0)}
    weights = {"a": torch.tensor([0.1, 3.0, 0.0, 0.0]), "b": torch.tensor([1.0, 2.0, 0.0, 0.0])}
    growth = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0]), "b": torch.tensor([0.0, 0.0, 8.0, 9.0])}
    # ceil(0.5·4) = 2 of all: 0.1 in a, 1.0 in b. Layer scope would prune the same here, so one more case below.
    assert update(masks, weights, growth, 0.5, scope="global_prune") == {"a": [0, 1, 0, 1], "b": [0, 1, 0, 1]}
    weights["b"] = torch.tensor([0.01, 0.02, 0.0, 0.0])
    # Both of b are weaker than a's, one is spared: b's 0.01 and a's 0.1 go.
    assert update(masks, weights, growth, 0.5, scope="global_prune", min_active=1) == {
        "a": [0, 1, 0, 1],
        "b": [0, 1, 0, 1],
    }
    # Nothing spared: b loses both and regrows both.
    assert update(masks, weights, growth, 0.5, scope="global_prune", min_active=0) == {
        "a": [1, 1, 0, 0],
        "b": [0, 0, 1, 1],
    }


def test_reallocated_scope_grows_in_proportion_to_what_layers_keep() -> None:
    masks = {"a": mask_of(*[1] * 4, *[0] * 4), "b": mask_of(*[1] * 4, *[0] * 8)}
    weights = {"a": torch.tensor([5.0, 6, 7, 8, *[0.0] * 4]), "b": torch.tensor([1.0, 2, 3, 4, *[0.0] * 8])}
    growth = {"a": torch.arange(8.0), "b": torch.arange(12.0)}
    # ceil(0.375·8) = 3 are pruned, all in b, which keeps 1 of the 5; of 3 new ones a gets 2.4 and b 0.6: 2 and 1
    assert update(masks, weights, growth, 0.375, scope="reallocated") == {
        "a": [1, 1, 1, 1, 0, 0, 1, 1],
        "b": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    }
    assert reallocated([6, 3], [8, 20], 14) == [8, 6]  # the example of the docstring
    assert reallocated([1, 1, 1], [9, 9, 9], 5) == [2, 2, 1]  # of equal remainders the earlier layers'
    assert reallocated([0, 0], [4, 4], 3) == [2, 1]  # nothing was kept, so layers get equal shares
    assert reallocated([4, 0], [4, 6], 7) == [4, 3]  # only a layer that kept nothing has room


def test_counts_follow_ceil_of_the_real_product() -> None:
    assert share_of(0.3, 10) == 3
    assert share_of(0.07, 100) == 7  # 0.07·100 is 7.000000000000001 in floating point
    assert share_of(0.31, 10) == 4
    assert share_of(1.0, 5) == 5
    assert share_of(0.0, 5) == 0


def test_sign_aware_pruning_takes_the_same_share_of_both_signs() -> None:
    values = torch.tensor([5.0, -1.0, 4.0, -2.0, 3.0, 6.0])
    # Positive, strongest first: 6, 5, 4, 3 -> 4/4, 3/4, 2/4, 1/4. Negative: -2, -1 -> 2/2, 1/2.
    assert sign_aware(values).tolist() == [0.75, 0.5, 0.5, 1.0, 0.25, 1.0]
    mask = {"w": mask_of(1, 1, 1, 1, 1, 1, 0, 0)}
    weights = {"w": torch.cat([values, torch.zeros(2)])}
    growth = {"w": torch.tensor([0.0] * 6 + [1.0, 1.0])}
    # 2 of 6: 3 (1/4), then of the two at 1/2 the higher index, 4; magnitude alone would take both negative ones.
    assert update(mask, weights, growth, 1 / 3, prune=sign_aware)["w"] == [1, 1, 0, 1, 0, 1, 1, 1]
    assert update(mask, weights, growth, 1 / 3)["w"] == [1, 0, 1, 0, 1, 1, 1, 1]


def test_no_pruning_changes_nothing() -> None:
    mask = {"w": mask_of(1, 0, 1)}
    assert update(mask, {"w": torch.ones(3)}, {"w": torch.ones(3)}, 0.9, prune=None)["w"] == [1, 0, 1]


def test_mixed_growth_takes_a_share_by_each_criterion() -> None:
    mask = {"w": mask_of(1, 1, 1, 0, 0, 0, 0, 0)}
    weights = {"w": torch.arange(3.0, -5.0, -1.0).clamp(min=0)}
    first = {"w": torch.tensor([0.0, 0, 0, 1, 9, 8, 7, 0])}
    second = {"w": torch.tensor([0, 0, 0, 5, 6, 0, 0, 4], dtype=torch.int32)}
    # All 3 are pruned; ceil(0.5·3) = 2 grow by the first (4, 5), the rest, 1, by the second among those left (3).
    new = prune_and_regrow(mask, weights, [(first, 0.5), (second, 1.0)], drop_fraction=1.0)
    assert bits(new["w"]) == [0, 0, 0, 1, 1, 1, 0, 0]


def test_density_steps_by_hand() -> None:
    masks = {"a": mask_of(1, 1, 1, 0), "b": mask_of(1, 0)}
    weights = {"a": torch.tensor([3.0, -1.0, 2.0, 0.0]), "b": torch.tensor([0.5, 0.0])}
    down = prune_to(masks, weights, 2, min_active=1)  # b's only one is spared, then the strongest of the others
    assert (bits(down["a"]), bits(down["b"])) == ([1, 0, 0, 0], [1, 0])
    down = prune_to(masks, weights, 2, min_active=0)
    assert (bits(down["a"]), bits(down["b"])) == ([1, 0, 1, 0], [0, 0])
    up = grow_to(masks, [({"a": torch.tensor([9.0, 9, 9, 1]), "b": torch.tensor([9.0, 2])}, 1.0)], 5)
    assert (bits(up["a"]), bits(up["b"])) == ([1, 1, 1, 0], [1, 1])


LAYER = st.integers(1, 12)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_every_update_keeps_the_number_of_active_weights(data: st.DataObject) -> None:
    """Layers of one weight, layers of density 0 and 1, all-equal and all-zero scores among them."""
    sizes = data.draw(st.lists(LAYER, min_size=1, max_size=4))
    scope = data.draw(st.sampled_from(sorted(SCOPES)))
    drop_fraction = data.draw(st.floats(0.0, 1.0))
    share = data.draw(st.sampled_from([0.3, 0.5, 1.0]))
    min_active = data.draw(st.integers(0, 2))
    few_values = st.integers(0, data.draw(st.integers(0, 2))).map(float)  # many ties
    masks, weights, first, second = {}, {}, {}, {}
    for layer, size in enumerate(sizes):
        name = f"l{layer}"
        masks[name] = torch.tensor(
            data.draw(st.one_of(st.lists(st.booleans(), min_size=size, max_size=size), st.just([True] * size)))
        )
        weights[name] = torch.tensor(data.draw(st.lists(few_values, min_size=size, max_size=size))) * masks[name]
        first[name] = torch.tensor(data.draw(st.lists(few_values, min_size=size, max_size=size)))
        second[name] = keyed_hash(key_of(layer), size).neg_()
    growth = [(first, 1.0)] if share == 1 else [(first, share), (second, 1.0)]
    again = [({name: score.clone() for name, score in scores.items()}, s) for scores, s in growth]
    new = prune_and_regrow(masks, weights, growth, drop_fraction=drop_fraction, scope=scope, min_active=min_active)
    assert sum(int(m.sum()) for m in new.values()) == sum(int(m.sum()) for m in masks.values())
    for name, mask in masks.items():
        before, after = int(mask.sum()), int(new[name].sum())
        if scope in ("layer", "global_prune"):
            assert after == before
        else:
            assert after >= min(min_active, before)
        if scope == "layer":
            assert int((mask & new[name]).sum()) >= before - math.ceil(drop_fraction * before)
    repeated = prune_and_regrow(masks, weights, again, drop_fraction=drop_fraction, scope=scope, min_active=min_active)
    assert all(torch.equal(new[name], repeated[name]) for name in new)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_density_steps_land_exactly(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(LAYER, min_size=1, max_size=4))
    masks = {
        f"l{i}": torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for i, n in enumerate(sizes)
    }
    weights = {name: torch.randn(len(mask)).round() for name, mask in masks.items()}
    active, total = sum(int(m.sum()) for m in masks.values()), sum(sizes)
    down = prune_to(masks, weights, data.draw(st.integers(0, active)), min_active=0)
    wanted = data.draw(st.integers(0, active))
    assert sum(int(m.sum()) for m in prune_to(masks, weights, wanted, min_active=0).values()) == wanted
    assert all(not (down[name] & ~masks[name]).any() for name in masks)
    wanted = data.draw(st.integers(active, total))
    up = grow_to(masks, [({name: torch.zeros(len(mask)) for name, mask in masks.items()}, 1.0)], wanted)
    assert sum(int(m.sum()) for m in up.values()) == wanted
    assert all(not (masks[name] & ~up[name]).any() for name in masks)


def test_a_dense_layer_has_nothing_to_regrow() -> None:
    mask = {"w": torch.ones(5, dtype=torch.bool)}
    assert update(mask, {"w": torch.arange(5.0)}, {"w": torch.rand(5)}, 0.4)["w"] == [1] * 5


@pytest.mark.parametrize(("num_active", "expected"), [(3, [[1, 0], [1, 1]]), ({"a": 2, "b": 1}, [[1, 1], [1, 0]])])
def test_magnitude_masks(num_active: int | dict[str, int], expected: list[list[int]]) -> None:
    weights = {"a": torch.tensor([-3.0, 0.5]), "b": torch.tensor([2.0, -2.0])}
    assert [bits(mask) for mask in magnitude_masks(weights, num_active).values()] == expected

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sparse.select import highest_k, key_of, keyed_hash, lowest_k


def test_of_equal_scores_the_lower_index_is_taken() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert lowest_k(scores, 3).tolist() == [False, True, True, False, True]
    assert highest_k(scores, 2).tolist() == [True, True, False, False, False]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_selection_is_exact_and_is_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    by_sorting = sorted(range(len(values)), key=lambda i: values[i])[:k]  # sorted() is stable
    assert lowest_k(torch.tensor(values, dtype=torch.float32), k).nonzero().flatten().tolist() == sorted(by_sorting)
    assert lowest_k(torch.tensor(values), k).nonzero().flatten().tolist() == sorted(by_sorting)


def test_infinite_scores_are_ordinary_scores() -> None:
    assert highest_k(torch.tensor([-torch.inf, 0.0, torch.inf, -torch.inf]), 3).tolist() == [True, True, True, False]


def test_keyed_hash_is_splitmix64() -> None:
    # The published first outputs of splitmix64 with seed 0, without their lowest bit.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert keyed_hash(0, 3).tolist() == [value >> 1 for value in published]


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {key_of(1, 2), key_of(2, 1), key_of(1, 2, 0), key_of(0, 1, 2), key_of(1, 3)}
    assert len(keys) == 5


def test_keyed_hash_is_uniform() -> None:
    share = (keyed_hash(key_of(7), 100_000) < 2**62).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.01)  # six standard deviations

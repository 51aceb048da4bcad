from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.sparse import at_once, select
from pipeline.sparse.select import (
    highest_k,
    highest_k_each,
    highest_k_of,
    highest_per_row,
    key_of,
    keyed_hash,
    lowest_k,
    lowest_k_of,
    multiply_by_masks,
    positions_each,
)

PINNED = [79438375, 319448499, 1301913523, 385654413, 662311867]


class CountHostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item", "aten.unique")
        self.count += str(func).startswith(waits) and not str(func).startswith("aten.nonzero_static")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["compiled", "numpy", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways to compute the same result: with numba, with numpy alone, on an accelerator."""
    monkeypatch.setattr(select, "_FEW", 0)  # so that a few hundred scores are treated like millions
    if request.param == "numpy":
        monkeypatch.setattr(select, "_kernels", lambda: None)
    if request.param == "device":
        monkeypatch.setattr(select, "is_on_host", lambda tensor: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64])
def test_every_path_marks_what_a_stable_sort_puts_first(path: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 3.0, 1e6):  # many ties, some, none
        scores = (torch.randn(997, generator=generator) * scale).round().to(dtype)
        scores[::50] = -0.0 if dtype.is_floating_point else 0
        parts = list(torch.split(scores, [1, 500, 0, 496]))
        for k in (0, 1, 10, 498, 996, 997):
            for mark, mark_of, descending in ((lowest_k, lowest_k_of, False), (highest_k, highest_k_of, True)):
                expected = torch.zeros(997, dtype=torch.bool)
                expected[scores.sort(stable=True, descending=descending).indices[:k]] = True
                assert torch.equal(mark(scores, k), expected)
                assert torch.equal(torch.cat(mark_of(parts, k)), expected)
        mask = scores > 0
        assert torch.equal(positions_each([mask], [int(mask.sum())])[0], mask.nonzero().flatten())


@pytest.mark.parametrize("group", [at_once.GROUP, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_every_path_ranks_every_layer_by_itself(
    path: str, dtype: torch.dtype, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "GROUP", group)
    generator = torch.Generator().manual_seed(1)
    sizes, numbers = [7, 1, 0, 30, 12, 5], [3, 1, 0, 0, 12, 2]
    parts = [(torch.randn(size, generator=generator) * 2).round().to(dtype) for size in sizes]
    marks = highest_k_each(parts, numbers)
    expected = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    for mark, part, number in zip(expected, parts, numbers, strict=True):
        mark[part.sort(stable=True, descending=True).indices[:number]] = True
    assert [mark.tolist() for mark in marks] == [mark.tolist() for mark in expected]
    assert select.count_true(marks) == numbers
    indices = positions_each(marks, numbers)
    assert [index.tolist() for index in indices] == [mark.nonzero().flatten().tolist() for mark in marks]
    every_second = [torch.arange(number) % 2 == 0 for number in numbers]
    new, taken = select.spread(every_second, indices, select.count_true(every_second), sizes)
    assert [mark.nonzero().flatten().tolist() for mark in new] == [index[::2].tolist() for index in indices]
    both, either = select.both(marks, new), select.either(marks, new)
    assert [(mark.tolist(), more.tolist()) for mark, more in zip(both, either, strict=True)] == [
        (mark.tolist(), whole.tolist()) for mark, whole in zip(new, marks, strict=True)
    ]
    lowest = -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    for found in (taken, select.taken_by(new, select.count_true(new))):
        left = select.without([part.clone() for part in parts], found)
        assert all(torch.equal(a, p.masked_fill(mark, lowest)) for a, p, mark in zip(left, parts, new, strict=True))


def test_every_path_counts_and_finds_what_is_left_outside(path: str) -> None:
    mask = torch.arange(24).view(2, 3, 2, 2) % 3 == 0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = torch.empty((2, 3, 2, 2), dtype=torch.bool).to(memory_format=memory_format).copy_(mask)  # type: ignore[call-overload]
        assert select.count_true([laid_out, torch.zeros(3, dtype=torch.bool), laid_out[1]]) == [8, 0, 4]
        clean = torch.where(laid_out, 1.0, -0.0)
        dirty = torch.where(laid_out, 1.0, float("nan"))
        assert select.are_nonzero_outside(
            [(clean, laid_out), (dirty, laid_out), (clean, mask), (clean[1], laid_out[1])]
        ) == [
            False,
            True,
            False,
            False,
        ]
        assert select.are_nonzero_outside([(torch.ones(2, 3, 2, 2).to(memory_format=memory_format), laid_out)]) == [
            True
        ]  # type: ignore[call-overload]
    assert select.are_nonzero_outside([]) == []


def test_every_path_hashes_and_masks_alike(path: str) -> None:
    # Positions beyond one chunk of the numpy path; the values are those of the compiled path, pinned.
    hashes = keyed_hash(key_of(3, 1), 20_000)
    assert hashes[[0, 1, 16_383, 16_384, 19_999]].tolist() == PINNED
    for memory_format in (torch.contiguous_format, torch.channels_last):
        values = torch.arange(-12.0, 12.0).view(2, 3, 2, 2).to(memory_format=memory_format)  # type: ignore[call-overload]
        mask = torch.empty_like(values, dtype=torch.bool).copy_(values % 3 == 0)
        expected = torch.where(values % 3 == 0, values, 0.0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tensor = values.to(dtype)
            multiply_by_masks([(tensor, mask)])
            assert torch.equal(tensor.float(), expected)
        strided = values.clone(memory_format=torch.contiguous_format)
        multiply_by_masks([(strided, mask)])  # of another memory format than the mask
        assert torch.equal(strided, expected)


def test_nothing_is_read_by_the_host_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "is_on_host", lambda tensor: False)
    with CountHostReads() as reads:
        highest_k_of([torch.randn(50), torch.randn(30)], 20)
        lowest_k(torch.randn(50).round(), 20)
        highest_per_row(torch.randn(6, 4), torch.full((6,), 2))
        positions_each([torch.randn(50) > 0, torch.randn(9) > 0], [20, 3])
        highest_k_each([torch.randn(50), torch.randn(30)], [20, 4])
        keyed_hash(5, 50)
        multiply_by_masks([(torch.randn(50), torch.randn(50) > 0)])
    assert reads.count == 0
    with CountHostReads() as reads:
        torch.randn(5).sum().item()
        torch.randn(5).nonzero()
    assert reads.count == 2  # the counter counts


def test_rows_have_their_own_quotas() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 0.0]])
    assert highest_per_row(scores, torch.tensor([1, 2])).int().tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]


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
    # The published first outputs of splitmix64 with seed 0, their 31 highest bits.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert keyed_hash(0, 3).tolist() == [value >> 33 for value in published]


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {key_of(1, 2), key_of(2, 1), key_of(1, 2, 0), key_of(0, 1, 2), key_of(1, 3)}
    assert len(keys) == 5


def test_keyed_hash_is_uniform() -> None:
    share = (keyed_hash(key_of(7), 100_000) < 2**30).double().mean().item()
    assert share == pytest.approx(0.5, abs=0.01)  # six standard deviations

"""A sparse state packs to bits and values that a reader can compute, and unpacks bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError
from pipeline.tickets.format import (
    pack_mask,
    pack_sparse,
    pack_values,
    unpack_sparse,
    unpack_stored_mask,
    unpack_values,
)


def test_bits_are_little_endian_in_logical_order() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
    assert pack_mask(mask).tolist() == [0b00001001, 0b00000011]  # elements 0 and 3; 8 and 9
    assert torch.equal(unpack_stored_mask(torch.tensor([9, 3], dtype=torch.uint8), [2, 5]), mask)


def test_values_are_the_active_weights_in_logical_order() -> None:
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()  # one active weight is 0: it has just grown
    assert pack_values(weight, mask).tolist() == [1.0, 3.0, 0.0, 5.0]
    assert torch.equal(unpack_values(torch.tensor([1.0, 3.0, 0.0, 5.0]), mask), weight)


def test_a_channels_last_weight_packs_as_its_logical_order() -> None:
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    mask = weight % 5 == 0
    plain = pack_sparse({"w": weight * mask}, {"w": mask})
    other = pack_sparse(
        {"w": (weight * mask).to(memory_format=torch.channels_last)}, {"w": mask.to(memory_format=torch.channels_last)}
    )
    assert plain["values/w"].tolist() == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2)).to(dtype).masked_fill(~mask, 0)
    weight[mask] = torch.where(torch.arange(int(mask.sum())) % 3 == 0, torch.tensor(-0.0, dtype=dtype), weight[mask])
    state, masks = unpack_sparse(pack_sparse({"w": weight}, {"w": mask}), {"w": [3, 5, 7]})
    as_bytes = lambda tensor: tensor.contiguous().view(torch.uint8)  # noqa: E731
    assert torch.equal(as_bytes(state["w"]), as_bytes(weight))  # equal() on floats would take -0 for 0
    assert torch.equal(masks["w"], mask)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_any_mask_comes_back(active: list[bool]) -> None:
    mask = torch.tensor(active)
    weight = torch.arange(1.0, len(active) + 1).masked_fill(~mask, 0)
    packed = pack_sparse({"w": weight}, {"w": mask})
    assert packed["mask/w"].numel() == (len(active) + 7) // 8 and packed["values/w"].numel() == sum(active)
    state, masks = unpack_sparse(packed, {"w": [len(active)]})
    assert torch.equal(state["w"], weight) and torch.equal(masks["w"], mask)


def test_a_weight_outside_its_mask_is_refused_not_lost() -> None:
    with pytest.raises(IntegrityError, match="w: 1 weights outside the mask are not zero"):
        pack_sparse({"w": torch.tensor([1.0, 2.0, 0.0])}, {"w": torch.tensor([True, False, False])})


def test_a_negative_zero_outside_the_mask_becomes_zero() -> None:
    packed = pack_sparse({"w": torch.tensor([1.0, -0.0])}, {"w": torch.tensor([True, False])})
    state, _ = unpack_sparse(packed, {"w": [2]})
    assert torch.copysign(torch.ones(1), state["w"][1]).item() == 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask/w": torch.tensor([0b0101, 0], dtype=torch.uint8)}, "expected 1 bytes for a mask of .*got uint8"),
        ({"mask/w": torch.tensor([0b100101], dtype=torch.uint8)}, "beyond its last weight"),
        (
            {"mask/w": torch.tensor([0b0111], dtype=torch.uint8)},
            r"the mask has 3 active weights, but the values have shape \[2\]",
        ),
        ({"mask/w": torch.tensor([5], dtype=torch.int8)}, "got int8"),
        ({"values/w": torch.zeros(2, 1)}, r"the mask has 2 active weights, but the values have shape \[2, 1\]"),
        ({"values/v": torch.zeros(2)}, "unexpected"),
        ({"dense/w": torch.zeros(5)}, "both dense and sparse"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], reason: str) -> None:
    packed = {"mask/w": torch.tensor([0b0101], dtype=torch.uint8), "values/w": torch.tensor([1.0, 2.0])}
    unpack_sparse(packed, {"w": [5]})
    with pytest.raises(IntegrityError, match=reason):
        unpack_sparse(packed | change, {"w": [5]})

"""Overlap and distance of tickets, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.tickets.compare import PackedMasks, differences, mask_overlap
from pipeline.tickets.format import Ticket, encode, read_packed

MakeTicket = Callable[..., Ticket]


def test_overlap(make_ticket: MakeTicket) -> None:
    one, other = make_ticket(), make_ticket()
    # fc: 1 0 1 / 0 1 0 against 1 1 0 / 0 1 0; the convolution's 8 of 40 are the same.
    other.masks["fc.weight"] = torch.tensor([[1, 1, 0], [0, 1, 0]]).bool()
    other.state["fc.weight"] *= other.masks["fc.weight"]
    overlap = mask_overlap(*(PackedMasks.of(read_packed(encode(ticket))) for ticket in (one, other)))
    assert overlap is not None
    assert (overlap.both, overlap.either) == (8 + 2, 8 + 4)
    assert overlap.share == 10 / 12
    by_chance = 8 * 8 / 40 + 3 * 3 / 6
    assert overlap.both_by_chance == pytest.approx(by_chance)
    assert overlap.share_by_chance == pytest.approx(by_chance / (11 + 11 - by_chance))


def test_other_networks_have_no_overlap() -> None:
    bits = {"w": torch.zeros(1, dtype=torch.uint8)}
    assert mask_overlap(PackedMasks(bits, {"w": 8}), PackedMasks(bits, {"w": 7})) is None
    assert mask_overlap(PackedMasks({}, {}), PackedMasks({}, {})) is None  # dense tickets


def test_differences(make_ticket: MakeTicket) -> None:
    one, other = make_ticket(), make_ticket()
    one.state["fc.bias"], other.state["fc.bias"] = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 7.0])
    other.masks["fc.weight"] = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    found = {each.name: each for each in differences(one, other)}
    assert (found["fc.bias"].distance, found["fc.bias"].relative) == (3.0, 0.6)
    assert (found["fc.weight"].num_left, found["fc.weight"].num_new) == (1, 2)
    assert found["conv.weight"].distance == 0

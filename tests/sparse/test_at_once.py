"""What a device computes for all layers at once. These functions run on any device; here on the CPU."""

from __future__ import annotations

import pytest
import torch

from pipeline.sparse import at_once


@pytest.mark.parametrize("group", [at_once.GROUP, 10])
def test_a_fingerprint_changes_with_every_bit_and_with_the_order_of_masks(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "GROUP", group)
    masks = [torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.3 for size in (7, 1, 9, 16)]
    seen = {int(at_once.fingerprint(masks)), int(at_once.fingerprint([masks[3], *masks[:3]]))}
    assert int(at_once.fingerprint([mask.clone() for mask in masks])) in seen
    for mask in masks:
        for index in range(len(mask)):
            mask[index] ^= True
            seen.add(int(at_once.fingerprint(masks)))
            mask[index] ^= True
    assert len(seen) == 2 + 7 + 1 + 9 + 16


@pytest.mark.parametrize("group", [at_once.GROUP, 10])
def test_values_outside_masks_are_counted_in_any_memory_format(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "GROUP", group)
    weights = [
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 5).t(),
        torch.randn(8).to(torch.bfloat16),
    ]
    masks = [torch.empty(weight.shape).bernoulli_(0.5).bool() for weight in weights]
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)
    assert int(at_once.num_nonzero_outside(weights, masks)) == 0
    for weight, mask, value in zip(weights, masks, (1e-30, float("nan"), -2.0), strict=True):
        weight[tuple((~mask).nonzero()[0])] = value
    assert int(at_once.num_nonzero_outside(weights, masks)) == 3
    assert int(at_once.num_nonzero_outside(weights, [mask.contiguous() for mask in masks])) == 3

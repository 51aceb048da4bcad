"""What a device computes for all layers at once. These functions run on any device; here on the CPU."""

from __future__ import annotations

import pytest
import torch

from pipeline.sparse import at_once
from pipeline.sparse.criteria import sign_aware
from pipeline.sparse.select import key_of, keyed_hash


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


@pytest.mark.parametrize("group", [at_once.GROUP, 10])
def test_scores_of_all_layers_at_once_are_those_of_each_layer(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(at_once, "GROUP", group)
    generator = torch.Generator().manual_seed(0)
    sizes, keys = [7, 4, 1, 3, 8], [key_of(0, layer) for layer in range(5)]
    hashes = at_once.hash_each(keys, sizes, torch.device("cpu"))
    for key, size, found in zip(keys, sizes, hashes, strict=True):
        assert torch.equal(found, keyed_hash(key, size))
    parts = [torch.randint(-3, 4, (size,), generator=generator).float() for size in sizes]  # with ties and zeros
    parts[1].abs_()  # one sign only
    for part, found in zip(parts, at_once.sign_aware(parts), strict=True):
        assert torch.equal(found, sign_aware(part))
    never = [part > 0 for part in parts]
    preferred = at_once.prefer_unmarked([-hashed for hashed in hashes], [~mark for mark in never])
    for hashed, mark, found in zip(hashes, never, preferred, strict=True):
        assert torch.equal(found, (-hashed >> 1) + mark * (1 << 30))

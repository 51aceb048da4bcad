"""Digests of the training state, in memory and from files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.digest import digest_of_tensors, network_digest
from pipeline.checkpoint.verify import digest_of_file
from pipeline.sparse import Sparsifier


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(6.0).view(2, 3),
        "a": torch.tensor(7),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
        "bits": torch.tensor([True, False]),
        "image": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    }


def test_a_file_has_the_digest_of_its_tensors_whatever_their_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "one")
    assert digest_of_file(tmp_path / "one") == digest_of_tensors(tensors)
    assert digest_of_tensors(dict(reversed(tensors.items()))) == digest_of_tensors(tensors)


def test_the_digest_follows_its_definition() -> None:
    of_a = hashlib.sha256((7).to_bytes(8, "little")).hexdigest()
    assert digest_of_tensors({"a": torch.tensor(7)}) == hashlib.sha256(f"a I64 [] {of_a}\n".encode()).hexdigest()


def test_the_memory_format_does_not_count_and_every_bit_does() -> None:
    tensors = some_tensors()
    moved = tensors | {"image": tensors["image"].to(memory_format=torch.channels_last)}
    assert digest_of_tensors(moved) == digest_of_tensors(tensors)
    negative = tensors | {"b": tensors["b"].clone()}
    negative["b"][0, 0] = -0.0
    assert digest_of_tensors(negative) != digest_of_tensors(tensors)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a": {}}'])
def test_what_is_not_a_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="bad cannot be read: "):
        digest_of_file(tmp_path / "bad")


def test_the_digest_of_a_network_covers_weights_masks_and_statistics() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), "set", density=0.5, seed=0)
    found = {network_digest(model, sparsifier)}
    with torch.no_grad():
        model[1].running_mean[0] += 1
        found.add(network_digest(model, sparsifier))
        model[1].bias[0] += 1
        found.add(network_digest(model, sparsifier))
    sparsifier._progress.history_digest = "other masks, some time ago"
    found.add(network_digest(model, sparsifier))
    assert len(found) == 4

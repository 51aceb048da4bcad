"""What a run starts from is read, checked against the configuration, and refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline import models
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, DataError, IntegrityError, RunError
from pipeline.sparse import Sparsifier
from pipeline.tickets import encode
from pipeline.tickets.own import own_ticket
from pipeline.training.start import FROM_SEED, read_start

ARGS = {"width": 4}


def config_of(*more: str) -> Config:
    sets = ["data.train=train.beton", "data.val=val.beton", "model.num_classes=10", "model.args={width: 4}"]
    return load_config("fashion_mnist_s90", [*sets, "plan.timetable=itop", "plan.refinement=null", *more])


def network(num_classes: int = 10) -> torch.nn.Module:
    return models.build("cifar_resnet8", num_classes=num_classes, args=ARGS, seed=3)


def sparse_network(num_classes: int = 10, **arguments: Any) -> tuple[torch.nn.Module, Sparsifier]:
    model = network(num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Sparsifier(model, optimizer, "rigl", **{"density": 0.1, "seed": 1, **arguments})


def write(path: Path, model: torch.nn.Module, sparsifier: Sparsifier, num_classes: int = 10) -> Path:
    built = models.BuiltAs("cifar_resnet8", num_classes, ARGS)
    ticket = own_ticket(model, sparsifier.masks, built_as=built, method="rigl", run="r", dense=sparsifier.dense)
    path.write_bytes(encode(ticket))
    return path


def test_without_either_the_run_starts_from_its_seed() -> None:
    assert read_start(config_of()) is FROM_SEED


def test_a_ticket_gives_weights_and_masks(tmp_path: Path) -> None:
    model, sparsifier = sparse_network()
    path = write(tmp_path / "a.safetensors", model, sparsifier)
    start = read_start(config_of(f"model.from_ticket={path}"))
    other = network()
    start.load(other)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert not isinstance(start.masks, str)
    assert all(torch.equal(start.masks[name], mask) for name, mask in sparsifier.masks.items())
    dense = read_start(config_of(f"model.from_ticket={path}", "sparsity.method=dense", "sparsity.density=1",
                                 "plan.timetable=dense"))  # fmt: skip
    assert dense.masks == "random"  # of density 1: all weights are active


def test_a_new_head_has_initial_weights_and_as_large_a_share_of_active_ones(tmp_path: Path) -> None:
    model, sparsifier = sparse_network(100)
    path = write(tmp_path / "a.safetensors", model, sparsifier, 100)
    start = read_start(config_of(f"model.from_ticket={path}", "model.new_head=true"))
    assert start.origin["new_head"] == ["fc.bias", "fc.weight"] and not {"fc.bias", "fc.weight"} & set(start.state)
    other = network()
    fresh = other.fc.weight.clone()
    start.load(other)
    assert torch.equal(other.fc.weight, fresh)
    assert not isinstance(start.masks, str)
    of_old, of_new = sparsifier.masks["fc.weight"], start.masks["fc.weight"]
    assert of_new.shape == other.fc.weight.shape
    assert int(of_new.sum()) == round(float(of_old.double().mean()) * of_new.numel())


@pytest.mark.parametrize("save", [safetensors.torch.save_file, torch.save])
def test_a_state_dict_gives_weights_and_the_masks_are_its_largest(save: Callable[..., None], tmp_path: Path) -> None:
    model, sparsifier = sparse_network()
    save(model.state_dict(), tmp_path / "state")
    start = read_start(config_of(f"model.from_state={tmp_path / 'state'}"))
    assert start.masks == "magnitude"
    other, _ = network(), None
    start.load(other)
    chosen = Sparsifier(
        other, torch.optim.SGD(other.parameters(), lr=0.1), "rigl", density=0.1, seed=9, masks=start.masks
    )
    for name, mask in chosen.masks.items():
        assert torch.equal(mask, sparsifier.masks[name])  # all other weights are 0
        assert torch.equal(chosen.weights[name], sparsifier.weights[name])


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("/tmp/ticketworks-hostile",)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    model, sparsifier = sparse_network()
    ticket = write(tmp_path / "a.safetensors", model, sparsifier)
    head = write(tmp_path / "head.safetensors", *sparse_network(100), 100)
    fewer = write(tmp_path / "fewer.safetensors", *sparse_network(dense_layers=["fc.weight"]))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(ticket.read_bytes()[:-1])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": Hostile()}, tmp_path / "hostile.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    torch.save({**model.state_dict(), "fc.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    cases: list[tuple[list[str], type[RunError], str]] = [
        ([f"from_ticket={tmp_path}/nowhere.safetensors"], DataError, "does not exist"),
        ([f"from_ticket={damaged}"], IntegrityError, "is not an intact ticket"),
        ([f"from_ticket={ticket}", "args={width: 8}"], DataError, "does not fit cifar_resnet8: .* in the network, but"),
        ([f"from_ticket={head}"], ConfigError, r"with 10 classes has it of shape .*do: set model\.new_head=true"),
        ([f"from_ticket={fewer}"], ConfigError, r"set sparsity\.density=0\.1|sparsity\.dense_layers=\[fc\.weight\]"),
        ([f"from_state={ticket}"], ConfigError, r"is a ticket; do: set model\.from_ticket="),
        ([f"from_state={tmp_path}/nowhere.pt"], DataError, "does not exist"),
        ([f"from_state={tmp_path}/text.pt"], DataError, r"neither a safetensors file nor one of torch\.save"),
        ([f"from_state={tmp_path}/hostile.pt"], DataError, "cannot be read without running code that it names"),
        ([f"from_state={tmp_path}/empty.pt"], DataError, "contains no state_dict"),
        ([f"from_state={tmp_path}/nan.pt"], DataError, "fc.bias has a value that is not finite"),
        ([f"from_state={tmp_path}/other.pt"], DataError, "does not fit cifar_resnet8"),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            read_start(config_of(*(f"model.{setting}" for setting in settings)))
        assert caught.value.do and "\n" not in str(caught.value)
    assert not Path("/tmp/ticketworks-hostile").exists()
    with pytest.raises(ConfigError, match=r"are active, but sparsity\.density is 0\.2; do: set sparsity\.density=0\.1"):
        read_start(config_of(f"model.from_ticket={ticket}", "sparsity.density=0.2"))
    for settings, message in (
        (["model.from_ticket=a", "model.from_state=b"], "cannot be set together with model.from_ticket"),
        (["model.new_head=true"], "needs model.from_ticket or model.from_state"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(*settings)

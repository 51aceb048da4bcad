"""Sparse networks of other projects as tickets: files in each layout, written here as those projects write them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pipeline import models
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import inputs
from pipeline.inference import load_ticket
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets.__main__ import main
from pipeline.tickets.foreign import LAYOUTS, import_ticket
from pipeline.tickets.format import encode
from pipeline.tickets.store import TicketStore

ARGS = {"width": 4}
PRUNED = ("blocks.0.conv1.weight", "fc.weight")
Written = tuple[dict[str, Any], nn.Module, dict[str, Tensor]]  # what is saved, the source's network, its masks


def network() -> nn.Module:
    model = models.build("cifar_resnet8", num_classes=10, args=ARGS, seed=5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    return model.eval()


def masked(density: float = 0.25) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network and masks of its weights: every fourth weight is active."""
    model, masks = network(), {}
    with torch.no_grad():
        for name, weight in sparse_weights(model).items():
            masks[name] = (torch.arange(weight.numel()) % round(1 / density) == 0).view(weight.shape)
            weight.mul_(masks[name])
    return model, masks


def zeros() -> Written:
    """Save weights that are 0 where they are pruned, under the names of DistributedDataParallel, as sparseml does."""
    model, masks = masked()
    return (
        {
            "epoch": 3,
            "recipe": "pruning: 0.75",
            "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        },
        model,
        masks,
    )


def masks_beside(ending: str, cast: Callable[[Tensor], Tensor]) -> Written:
    """Save dense weights under their masks, as layers that multiply both do."""
    model, masks = masked()
    dense = network().state_dict()
    state = {**dense, **{f"{name.removesuffix('.weight')}{ending}": cast(mask) for name, mask in masks.items()}}
    return state, model, masks


def masks_apart() -> Written:
    model, masks = masked()
    kept = {f"module.{name}": mask.float() for name, mask in masks.items()}
    return {"state_dict": network().state_dict(), "masks": kept, "optimizer": {"lr": 0.1}}, model, masks


def torch_prune() -> Written:
    model = network()
    for name in PRUNED:
        prune.l1_unstructured(model.get_submodule(name.removesuffix(".weight")), "weight", amount=0.75)
    masks = {name: model.get_buffer(f"{name}_mask").bool() for name in PRUNED}
    return dict(model.state_dict()), model, masks


def str_thresholds() -> Written:
    """Save dense weights and a threshold for each layer; the network multiplies with weights that are nearer to 0."""
    model = network()
    state, masks = dict(copy.deepcopy(model.state_dict())), {}
    with torch.no_grad():
        for name in PRUNED:
            weight = model.get_parameter(name)
            share = weight.abs().flatten().kthvalue(weight.numel() * 3 // 4).values  # sigmoid(s) is this magnitude
            threshold = torch.log(share / (1 - share)).view(1, 1)
            state[name.replace("weight", "sparseThreshold")] = threshold
            weight.copy_(torch.sign(weight) * torch.relu(torch.abs(weight) - torch.sigmoid(threshold)))
            masks[name] = weight.detach() != 0
    return state, model, masks


CASES: dict[str, tuple[str, Callable[[], Written]]] = {
    "sparseml, AC/DC": ("zeros", zeros),
    "RigL": ("masks", lambda: masks_beside(".weight_mask", Tensor.float)),
    "SRigL": ("masks", lambda: masks_beside(".mask", Tensor.bool)),
    "ITOP": ("masks-apart", masks_apart),
    "torch.nn.utils.prune": ("torch-prune", torch_prune),
    "STR": ("str", str_thresholds),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_imported_network_gives_the_outputs_of_its_source_bit_for_bit(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, make = CASES[case]
    saved, source, masks = make()
    torch.save(saved, tmp_path / "a.pth")
    output = tmp_path / "a.safetensors"
    arguments = ["--model", "cifar_resnet8", "--model-args", json.dumps(ARGS), "--num-classes", "10"]
    assert main(["import", str(tmp_path / "a.pth"), *arguments, "--output", str(output)]) == 0
    active, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    said = capsys.readouterr().out
    assert f"layout {layout}, {active:,} of {total:,} weights active in {len(masks)} layers" in said

    loaded = load_ticket(output)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), source(images))
    ticket, of = loaded.ticket, loaded.provenance
    assert all(torch.equal(ticket.masks[name], mask) for name, mask in masks.items())
    assert ticket.masks.keys() == masks.keys()
    assert (ticket.num_active, of.density) == (active, active / total)
    assert ticket.network is not None
    parameters = sum(weight.numel() for weight in network().parameters())
    assert ticket.network.parameters == parameters
    assert ticket.network.density == (parameters - total + active) / parameters
    assert (of.method, of.origin["from"], of.origin["layout"], of.origin["name"]) == (
        "imported", "import", layout, "a.pth",
    )  # fmt: skip


def test_a_safetensors_file_and_torchs_files_give_the_same_ticket(tmp_path: Path) -> None:
    model, _ = masked()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.bin")
    one, other = (
        import_ticket(tmp_path / name, "cifar_resnet8", args=ARGS, num_classes=10)[0] for name in ("a.pth", "a.bin")
    )
    assert one.provenance.mask_digest == other.provenance.mask_digest
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def test_an_imported_ticket_stands_beside_those_of_runs(tmp_path: Path) -> None:
    """With the classes and the preparation of images of one of theirs."""
    model, masks = masked()
    prepared = {"eval_resolution": 32, "eval_ratio": 1.0, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    torch.save(model.state_dict(), tmp_path / "published.pth")
    names = tuple("abcdefghij")
    own, _ = import_ticket(
        tmp_path / "published.pth", "cifar_resnet8", args=ARGS, classes=names, preprocessing=prepared, run="own"
    )
    (tmp_path / "runs/own/tickets").mkdir(parents=True)
    (tmp_path / "runs/own/tickets/ticket-000.safetensors").write_bytes(encode(own))
    arguments = ["--model", "cifar_resnet8", "--model-args", json.dumps(ARGS), "--like", str(tmp_path / "runs/own")]
    output = tmp_path / "published.safetensors"
    assert main(["import", str(tmp_path / "published.pth"), *arguments, "--output", str(output)]) == 0
    runs = inputs.open_runs([tmp_path / "runs/own", output])
    assert [run.label for run in runs] == ["own", "published"]
    first, second = (run.refs[0].provenance for run in runs)
    assert (second.num_classes, second.preprocessing) == (10, prepared)
    assert second.class_list_digest == first.class_list_digest != ""
    assert len(TicketStore(output).list()) == 1 and masks


def test_an_import_that_does_not_know_its_classes_stands_beside_a_run_only_where_one_says_so(tmp_path: Path) -> None:
    model, _ = masked()
    torch.save(model.state_dict(), tmp_path / "published.pth")
    own, _ = import_ticket(tmp_path / "published.pth", "cifar_resnet8", args=ARGS, classes=tuple("abcdefghij"))
    bare, _ = import_ticket(tmp_path / "published.pth", "cifar_resnet8", args=ARGS, num_classes=10, run="bare")
    paths = [tmp_path / "own.safetensors", tmp_path / "bare.safetensors"]
    for path, ticket in zip(paths, (own, bare), strict=True):
        path.write_bytes(encode(ticket))
    with pytest.raises(DataError, match="one of them does not record the names of its classes; do: import it with"):
        inputs.open_runs(paths)
    assert [run.label for run in inputs.open_runs(paths, may_differ=True)] == ["own", "bare"]
    named = tmp_path / "named.safetensors"
    other = dataclasses.replace(own, provenance=dataclasses.replace(own.provenance, class_list_digest="e0"))
    named.write_bytes(encode(other))
    with pytest.raises(DataError, match="was trained on different classes"):
        inputs.open_runs([paths[0], named], may_differ=True)


def test_what_is_ambiguous_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, masks = masked()
    state = model.state_dict() | {f"{name}_mask": mask for name, mask in masks.items() if name != "fc.weight"}
    kept = {name: mask for name, mask in masks.items() if name != "fc.weight"}
    torch.save({"state_dict": state, "masks": kept}, tmp_path / "a.pth")
    command = ["import", str(tmp_path / "a.pth"), "--model", "cifar_resnet8", "--model-args", '{"width": 4}']
    assert main([*command, "--num-classes", "10", "--output", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "note: the file also has the layout 'masks-apart', which gives the same network" in said
    assert "note: fc.weight has weights that are 0, but no mask: it counts as dense" in said
    assert "note: how images are prepared is not known: pass --like or --imagenet" in said
    assert "note: the classes have no names" in said
    torch.save(model.state_dict(), tmp_path / "b.pth")
    command[1] = str(tmp_path / "b.pth")
    assert main([*command, "--num-classes", "10", "--imagenet", "--output", str(tmp_path / "b.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "note: the masks are the weights that are not 0" in said and "prepared" not in said


def test_what_cannot_be_imported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = masked()[0].state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save(network().state_dict(), tmp_path / "dense.pth")
    torch.save(state | {"stem.weight_mask": torch.full((4, 3, 3, 3), 0.5)}, tmp_path / "soft.pth")
    torch.save(state | {"stem_bn.weight_mask": torch.ones(4)}, tmp_path / "norm.pth")
    torch.save({"state_dict": state, "masks": {"other": torch.ones(2)}}, tmp_path / "other.pth")
    one, other = torch.ones(4, 3, 3, 3), torch.zeros(4, 3, 3, 3)
    two_readings = {"state_dict": state | {"stem.weight_mask": one}, "masks": {"stem.weight": other}}
    torch.save(two_readings, tmp_path / "two.pth")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layout": "zeroes"}, ConfigError, "did you mean 'zeros'"),
        ({"layout": "str"}, DataError, "does not have the layout 'str': a threshold beside .*do: pass --layout zeros"),
        (
            {"num_classes": 11},
            DataError,
            "does not fit cifar_resnet8: .*do: set --model, --model-args and --num-classes",
        ),
        ({"path": "dense.pth"}, DataError, "no weight is 0 and there are no masks"),
        ({"path": "soft.pth"}, DataError, "stem.weight: expected a mask of 0 and 1 of shape"),
        ({"path": "norm.pth"}, DataError, "stem_bn.weight has a mask, but is not a weight of cifar_resnet8"),
        ({"path": "other.pth"}, DataError, "other: the file has a mask of it, but not the weight"),
        (
            {"path": "two.pth"},
            DataError,
            "has the layouts 'masks' and 'masks-apart', which give different networks; do: pass --layout masks or",
        ),
        ({"path": "nowhere.pth"}, DataError, "does not exist"),
    ]
    for settings, kind, message in cases:
        arguments = {"path": "a.pth", "model": "cifar_resnet8", "args": ARGS, "num_classes": 10, **settings}
        with pytest.raises(kind, match=message) as caught:
            import_ticket(**{**arguments, "path": tmp_path / arguments["path"]})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    command = [
        "import",
        str(tmp_path / "a.pth"),
        "--model",
        "cifar_resnet8",
        "--output",
        str(tmp_path / "a.safetensors"),
    ]
    assert main([*command, "--model-args", "width=4"]) == 64
    assert main([*command[:-1], str(tmp_path / "a.pth")]) == 64
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_commands_help_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in LAYOUTS)

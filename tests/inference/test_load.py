"""A ticket as a torch network: the network that was trained, and pictures as the evaluation prepares them."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.support.samples import sample_provenance
from pipeline import models, zoo
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import open_eval_loader
from pipeline.errors import ConfigError, DataError, IntegrityError, WriteError
from pipeline.files import sha256_of
from pipeline.inference import TicketNetwork, load_ticket, predict, save_ticket
from pipeline.sparse import Sparsifier
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets import Network, Ticket, TicketStore, encode, ticket_of
from tests.sparse.test_minimal_environment import OLDEST, environment_with
from tools.environment import shared_environment, shared_root, site_packages

ROOT = Path(__file__).parents[2]
SIDE = 16  # pixels
PREPARED = {"eval_resolution": SIDE, "eval_ratio": 0.875, "mean": [10.0, 20.0, 30.0], "std": [4.0, 5.0, 6.0]}
CLASSES = ("boot", "shirt")


def small_network() -> torch.nn.Module:
    return models.build("cifar_resnet8", num_classes=2, args={"width": 4}, seed=1)


def small_ticket(
    network: torch.nn.Module | None = None, *, classes: tuple[str, ...] = CLASSES, **stated: Any
) -> Ticket:
    """Make a ticket with every third weight active and statistics that are not those of the start."""
    network = network or small_network()
    masks = {}
    with torch.no_grad():
        for name, weight in sparse_weights(network).items():
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask.view(-1)[::3] = True
            masks[name] = mask
            weight.mul_(mask)
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    of: dict[str, Any] = {"model": "cifar_resnet8", "model_args": {"width": 4}, "preprocessing": PREPARED} | stated
    parameters = sum(weight.numel() for weight in network.parameters())
    described = Network(classes, parameters, 0.4, {})
    return ticket_of(network, masks, provenance=sample_provenance(**of), network=described)


@pytest.mark.parametrize("kind", ["ticket", "bytes", "path"])
def test_the_loaded_network_is_the_one_of_the_ticket(kind: str, tmp_path: Path) -> None:
    trained = small_network()
    ticket = small_ticket(trained)
    path = tmp_path / "ticket-000.safetensors"
    path.write_bytes(encode(ticket))
    loaded = load_ticket({"ticket": ticket, "bytes": encode(ticket), "path": path}[kind])
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), trained.eval()(images))
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert loaded.classes == CLASSES
    assert loaded.resolution == SIDE
    assert loaded.provenance == ticket.provenance
    assert loaded.ticket.content_digest == ticket.content_digest
    weights = dict(loaded.network.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in ticket.masks.items())
    assert repr(loaded).startswith("TicketNetwork(\n  ticket 0 of run: cifar_resnet8, rigl, density 0.33")


def test_rounded_weights_are_computed_in_float32_and_unnamed_classes_have_their_number() -> None:
    network = small_network()
    ticket = small_ticket(network, classes=("boot",))
    rounded = ticket_of(
        network, ticket.masks, provenance=ticket.provenance, network=ticket.network, dtype=torch.bfloat16
    )
    loaded = load_ticket(rounded)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.classes == ("boot", "1")
    assert load_ticket(dataclasses.replace(ticket, network=None)).classes == ("0", "1")


@pytest.mark.parametrize("eval_resize", ["area", "torchvision"])
def test_pictures_are_prepared_to_the_bit_as_in_an_evaluation(eval_resize: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sides = [(20, 33), (41, 17), (16, 16), (9, 12)]
    arrays = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sides]
    paths = []
    for index, array in enumerate(arrays):
        paths.append(tmp_path / "images" / CLASSES[index % 2] / f"{index}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(paths[-1])
    data = DataConfig(loader="folder", train="", val="", num_workers=1, **PREPARED, eval_resize=eval_resize)
    loader = open_eval_loader(tmp_path / "images", data, batch=8, device=torch.device("cpu"), channels_last=False)
    ids, images, _ = next(iter(loader.batches()))
    in_order = sorted(range(4), key=lambda index: (index % 2, index))  # by class, then by name
    expected = [images[ids.tolist().index(in_order.index(index))] for index in range(4)]

    loaded = load_ticket(small_ticket(preprocessing=PREPARED | {"eval_resize": eval_resize}))
    for path, array, prepared in zip(paths, arrays, expected, strict=True):
        for picture in (path, str(path), Image.fromarray(array), array, torch.from_numpy(array)):
            assert torch.equal(loaded.preprocess(picture), prepared)
    probabilities = loaded.predict(paths)
    assert torch.allclose(probabilities, loaded(torch.stack(expected)).softmax(dim=1))
    assert torch.equal(loaded.predict(paths[0])[0], loaded.predict([paths[0]])[0])
    assert loaded.predict([]).shape == (0, 2)


def test_grey_pictures_have_three_equal_channels() -> None:
    loaded = load_ticket(small_ticket(preprocessing=PREPARED | {"eval_ratio": 1.0}))
    grey = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    prepared = loaded.preprocess(grey)
    assert prepared.shape == (3, SIDE, SIDE)
    assert prepared[:, 1, 2].tolist() == pytest.approx([(18 - 10) / 4, (18 - 20) / 5, (18 - 30) / 6])
    assert torch.equal(prepared, loaded.preprocess(Image.fromarray(grey)))


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (np.zeros((4, 4, 3), np.float32), "expected levels from 0 to 255 of type uint8, .* got float32 values"),
        ([1, 2], "got list"),
        (np.zeros((3, 4, 5), np.uint8), r"expected the shape .*, got \[3, 4, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
        ("/nowhere/boot.png", "/nowhere/boot.png"),
        (__file__, "test_load.py"),
    ],
)
def test_what_is_not_a_picture_is_refused(picture: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load_ticket(small_ticket()).preprocess(picture)
    assert caught.value.do and "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "tickets" / "ticket-003.safetensors"
    path.parent.mkdir()
    content = bytearray(encode(small_ticket()))
    content[-1] ^= 1
    path.write_bytes(content)
    cases: list[tuple[Any, type[Exception], str]] = [
        (path, IntegrityError, "ticket-003"),
        (tmp_path / "absent.safetensors", DataError, "does not exist"),
        (tmp_path, DataError, "contains no intact ticket; the only candidate is unusable: .*ticket-003"),
        (path.parent, DataError, "contains no intact ticket; the only candidate is unusable: .*ticket-003"),
        (tmp_path / "tickets/..", DataError, "contains no intact ticket"),
        ("no-such-entry", ConfigError, "is neither a file nor an entry of the zoo .*; do: pass a ticket file, or"),
        (small_ticket(model="no_such_model"), ConfigError, "is not a model"),
        (small_ticket(model="mine:Net"), ConfigError, "'mine:Net' is a network of one's own, which a file cannot load"),
        (small_ticket(model_args={"width": 8}), DataError, "ticket 0 of run does not fit cifar_resnet8"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            load_ticket(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"does not say how images are prepared \(data.eval_resolution is missing\)"):
        load_ticket(small_ticket(preprocessing={})).predict([np.zeros((4, 4, 3), np.uint8)])


def test_entries_of_the_zoo_are_found_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "boots"
    for place in ("tickets/ticket-000", "tickets/ticket-001", "report/superposition-mean"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.safetensors").write_bytes(encode(small_ticket()))
    (folder / zoo.MANIFEST).write_text("{}")
    entry = {"bundle": "boots", "sha256": sha256_of(folder / zoo.MANIFEST), "ticket": "superposition-mean"}
    (tmp_path / zoo.INDEX).write_text(json.dumps({"entries": {"boots": entry}}))
    assert list(zoo.tickets("boots", tmp_path)) == ["superposition-mean", "ticket-000", "ticket-001"]
    assert zoo.find_ticket("boots", tmp_path) == folder / "report/superposition-mean.safetensors"
    assert zoo.find_ticket("boots/ticket-001", tmp_path) == folder / "tickets/ticket-001.safetensors"
    for name, message in (
        ("boot", "pass a ticket file, or one of boots; the zoo comes with a checkout"),
        (
            "boots/ticket-002",
            "boots has no ticket 'ticket-002'; do: pass one of superposition-mean, ticket-000, ticket-001",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.find_ticket(name, tmp_path)
    (folder / "report/superposition-mean.safetensors").unlink()
    with pytest.raises(IntegrityError, match="contains no ticket superposition-mean, which the index names"):
        zoo.find_ticket("boots", tmp_path)
    packed = {"bundle": "a.tar", "sha256": sha256_of(folder / zoo.MANIFEST)}
    shutil.copy(folder / zoo.MANIFEST, tmp_path / "a.tar")
    (tmp_path / zoo.INDEX).write_text(json.dumps({"entries": {"boots": entry, "packed": packed}}))
    with pytest.raises(DataError, match=r"packed: its bundle .*a\.tar is packed; do: unpack it with tar"):
        zoo.find_ticket("packed", tmp_path)
    (folder / zoo.MANIFEST).write_text("{ }")
    with pytest.raises(IntegrityError, match="has sha256"):
        zoo.find_ticket("boots", tmp_path)


SCRIPT = """
import sys
import numpy as np
from pipeline.errors import ConfigError
from pipeline.inference import load_ticket

network = load_ticket(sys.argv[1])
print(network.predict([np.zeros((16, 16, 3), np.uint8)]).sum().round().item(), network.classes)
print(sorted({"torchvision", "omegaconf", "deepspeed", "ffcv", "mlflow", "numba", "PIL", "psutil"} & set(sys.modules)))
try:
    network.preprocess("boot.png")
except ConfigError as error:
    print(error)
"""


def test_torch_numpy_and_safetensors_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "ticket.safetensors"
    path.write_bytes(encode(small_ticket(preprocessing=PREPARED | {"eval_ratio": 1.0})))
    done = run_with(tmp_path, SCRIPT, str(path), packages=("torch", "numpy", "safetensors"))
    assert done.stdout.splitlines() == [
        "1.0 ('boot', 'shirt')",
        "[]",
        "pillow is needed to read image files and not installed; do: python -m pip install pillow",
    ]


def run_with(
    folder: Path, code: str, *arguments: str, packages: tuple[str, ...], other: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code where only these packages are installed, and those of another environment."""
    environment = environment_with(folder / "environment", *packages)
    if other is not None:
        (site_packages(environment) / "other.pth").write_text(f"{site_packages(other)}\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(environment / "bin/python"), "-c", code, *arguments],
        capture_output=True, text=True, cwd=folder, env=environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def snippet() -> str:
    section = (ROOT / "docs/inference.md").read_text().split("\n## A ticket from your own loop\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


def test_the_snippet_of_the_page_runs_and_its_ticket_is_one_for_every_command(tmp_path: Path) -> None:
    """Also without numba, whose place plain Python takes, with the same pixels."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (34, 41, 3), dtype=np.uint8)).save(tmp_path / "boot.png")
    loader = "import torch\ntorch.manual_seed(0)\n"
    loader += "loader = [(torch.randn(4, 3, 28, 28), torch.randint(0, 10, (4,))) for _ in range(3)]\n"
    digest = "\nimport hashlib\nprint(hashlib.sha256(network.transform('boot.png').numpy().tobytes()).hexdigest())"
    done = run_with(tmp_path, loader + snippet() + digest, packages=("torch", "numpy", "safetensors", "pillow"))
    of_zoo, of_own, pixels = done.stdout.splitlines()
    (named,) = ast.literal_eval(of_zoo)
    zoo_network = load_ticket("fashion_mnist_s90")
    assert [name for name, _ in named] == [
        zoo_network.classes[index] for index in zoo_network.predict(tmp_path / "boot.png")[0].topk(3).indices
    ]
    assert pixels == hashlib.sha256(zoo_network.transform(tmp_path / "boot.png").numpy().tobytes()).hexdigest()
    assert "numba is not installed: images are cropped and resized slowly" in done.stderr

    mine = load_ticket(tmp_path / "mine.safetensors")
    ((first, value),) = ast.literal_eval(of_own)[0]
    assert predict(mine, [str(tmp_path / "boot.png")]) == [[(first, pytest.approx(value, abs=1e-6))]]
    of = mine.provenance
    assert (of.model, of.model_args, of.num_classes, of.method, of.step) == (
        "cifar_resnet8", {"width": 4}, 10, "static", 3,
    )  # fmt: skip
    assert of.class_list_digest == zoo_network.provenance.class_list_digest
    assert mine.ticket.num_active == round(0.1 * sum(mask.numel() for mask in mine.ticket.masks.values()))
    (ref,) = TicketStore(tmp_path / "mine.safetensors").list()
    assert ref.content_digest == mine.ticket.content_digest


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="torch 2.4 has no build for this Python")
@pytest.mark.timeout(1800)  # it is downloaded the first time
def test_the_snippet_of_the_page_runs_on_torch_2_4_and_numpy_1(tmp_path: Path) -> None:
    Image.new("RGB", (34, 41), "red").save(tmp_path / "boot.png")
    loader = "import torch\nloader = [(torch.randn(4, 3, 28, 28), torch.randint(0, 10, (4,)))]\n"
    oldest = shared_environment(shared_root(), OLDEST)
    code = loader + snippet() + "\nprint(torch.__version__)"
    done = run_with(tmp_path, code, packages=("safetensors", "pillow"), other=oldest)
    of_zoo, of_own, version = done.stdout.splitlines()
    assert version.startswith("2.4.0")
    ours = predict(load_ticket("fashion_mnist_s90"), [str(tmp_path / "boot.png")], top=3)
    for one, other in zip(ast.literal_eval(of_zoo)[0], ours[0], strict=True):
        assert one == (other[0], pytest.approx(other[1], abs=1e-5))
    assert predict(tmp_path / "mine.safetensors", tmp_path / "boot.png")[0][0][0] == ast.literal_eval(of_own)[0][0][0]


def trained(model: torch.nn.Module) -> Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Sparsifier(model, optimizer, "rigl", density=0.5, seed=0)


class Own(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.append(torch.nn.Linear(4, 2))


def test_a_network_of_ones_own_class_is_saved_and_loaded_into_one_that_the_caller_builds(tmp_path: Path) -> None:
    model = Own()
    path = tmp_path / "runs" / "x" / "tickets" / "ticket-007.safetensors"
    path.parent.mkdir(parents=True)
    saved = save_ticket(
        torch.nn.DataParallel(model), trained(model), path, classes=CLASSES, preprocessing=PREPARED, batch=32, index=7
    )
    assert saved.provenance.model == f"{Own.__module__}:Own"
    of = saved.network
    assert of is not None and of.parameters == 108 + 4 + 8 + 2 and of.density == (58 + 6) / 122  # (108 + 8) / 2 = 58
    with pytest.raises(ConfigError, match=r"load_ticket\(…, network=…\)"):
        load_ticket(path)
    images = torch.randn(2, 3, SIDE, SIDE)
    for place in (path, path.parent, tmp_path / "runs/x", f"file://{path}"):
        assert torch.equal(load_ticket(place, network=Own())(images), model.eval()(images))
    with pytest.raises(DataError, match="ticket 7 of own loop does not fit"):
        load_ticket(path, network=torch.nn.Linear(2, 2))


def test_what_cannot_be_saved_is_one_line(tmp_path: Path) -> None:
    model, path = Own(), tmp_path / "mine.safetensors"
    sparsifier = trained(model)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigError, "classes: expected the names of the classes"),
        ({"path": tmp_path / "mine.pt"}, ConfigError, "ends in .safetensors"),
        ({"classes": ["a", 1]}, ConfigError, "network: classes: expected every entry to be text"),
        ({"classes": CLASSES, "name": "resnet18"}, DataError, "the network does not fit resnet18"),
        ({"classes": CLASSES, "name": "resnet_18"}, ConfigError, "is not a model of"),
        ({"classes": CLASSES, "preprocessing": {"size": 4}}, ConfigError, "preprocessing: 'size' is not one of"),
        ({"classes": CLASSES, "preprocessing": {"std": (0.2, 0.2, 0.25)}}, ConfigError, r"255: \[51, 51, 63.75\]"),
        ({"classes": CLASSES, "preprocessing": {"eval_resolution": 0}}, ConfigError, "a whole number from 1"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            save_ticket(model, sparsifier, **{"path": path, **arguments})
        assert "\n" not in str(caught.value)
    save_ticket(model, sparsifier, path, classes=CLASSES)
    with pytest.raises(WriteError, match=r"already exists; do: .*overwrite=True"):
        save_ticket(model, sparsifier, path, classes=CLASSES)
    save_ticket(model, sparsifier, path, classes=CLASSES, overwrite=True)
    with pytest.raises(ConfigError, match="top: expected at least 1, got 0"):
        predict(small_ticket(), [], top=0)


def test_a_ticket_network_is_an_ordinary_module() -> None:
    loaded = TicketNetwork(small_ticket())
    assert isinstance(loaded, torch.nn.Module)
    assert set(loaded.state_dict()) == {f"network.{name}" for name in small_network().state_dict()}

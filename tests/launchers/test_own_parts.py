"""Parts of one's own: the example package is installed, and the stock commands use it; a file never chooses code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.support.samples import sample_provenance
from pipeline import models, parts
from pipeline.config.load import config_of, load_config
from pipeline.config.registries import REGISTRIES, choices_of
from pipeline.config.schema import KEYS
from pipeline.errors import ConfigError
from pipeline.inference import load_ticket
from pipeline.models.names import MODELS
from pipeline.models.registry import OWN_MODELS
from pipeline.tickets.__main__ import main as tickets
from pipeline.tickets.format import decode, encode, ticket_of
from pipeline.tickets.store import TicketStore
from tests.support.launch import ROOT
from tests.support.stored_run import make_images

EXAMPLE = ROOT / "examples" / "own_parts"
SCRIPT = Path(__file__).with_name("own_parts_script.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the example package, as a user's pip does."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "own_parts"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True, cwd=folder)
    return folder


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what a test has named."""
    before = dict(parts._imported)
    yield
    parts._imported.clear()
    parts._imported.update(before)


def test_the_example_package_is_trained_resumed_evaluated_and_exported(installed: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "data")
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{installed}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(EXAMPLE / "own_parts.yaml"), str(tmp_path / "data")],
        cwd=tmp_path, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CODES")] or [done.stderr[-3000:]]
    assert line == "CODES [0, 75, 0, 0, 0] TinyNet {'imports': {'own_parts': '0.1.0'}}"

    whole, resumed = (TicketStore(tmp_path / run).list() for run in ("whole", "parts"))
    assert [ref.provenance.phase for ref in whole] == ["exploration", "last"]
    for one, other in zip(whole, resumed, strict=True):
        first, second = decode(one.path), decode(other.path)
        assert all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())
        assert first.provenance.method == "last_itop" and first.provenance.model == "tiny_net"
        assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
    assert (tmp_path / "whole" / "last-loss.txt").exists()
    report = json.loads((tmp_path / "judged" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]][:2] == ["ticket-0", "ticket-1"]
    assert (tmp_path / "whole.safetensors").exists()

    # without the package, one line everywhere
    with pytest.raises(
        ConfigError, match=r"its network 'tiny_net' needs own_parts, which a file cannot load; do: name"
    ):
        load_ticket(tmp_path / "whole")
    with pytest.raises(ConfigError, match="imports: own_parts is not installed; do: install it"):
        load_config(str(EXAMPLE / "own_parts.yaml"), ["data.train=a", "data.val=b"])
    with pytest.raises(ConfigError, match="imports: needs own_parts, which a file cannot load; do: pass --imports"):
        load_config(str(tmp_path / "whole" / "config.yaml"), may_import=False)  # as launchers.verify reads it
    with pytest.raises(ConfigError, match="imports: needs own_parts, which a file cannot load"):
        config_of("config.yaml", {"name": "a", "imports": ["own_parts"], "data": {"train": "a", "val": "b"}})
    assert tickets(["show", str(tmp_path / "whole")]) == 0  # needs no network


HOSTILE = """
from pathlib import Path
Path({mark!r}).touch()
"""


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("name", ["cifar_resnet8", "hostile_part", "hostile_part:build", "os:system"])
def test_a_hostile_ticket_that_names_an_import_imports_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "hostile_part.py").write_text(HOSTILE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    model = models.build("cifar_resnet8", num_classes=2, args={"width": 4})
    origin = {"imports": {"hostile_part": "1", "os": "2"}}
    made = dataclasses.replace(sample_provenance(model=name, model_args={"width": 4}), origin=origin)
    path = tmp_path / "ticket.safetensors"
    path.write_bytes(encode(ticket_of(model, {}, provenance=made)))
    for command in ("show", "verify", "ls"):
        assert tickets([command, str(path)]) == 0
    if name == "cifar_resnet8":  # which needs no package
        load_ticket(path)
    else:
        with pytest.raises(ConfigError, match="needs hostile_part, os, which a file cannot load") as caught:
            load_ticket(path)
        assert "\n" not in str(caught.value)
        assert tickets(["bench", str(path)]) == 64
    capsys.readouterr()
    assert not mark.exists() and "hostile_part" not in sys.modules


@pytest.mark.usefixtures("imported")
def test_what_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_part.py").write_text("1 / 0\n")
    (tmp_path / "needing_part.py").write_text("import no_such_library\n")
    (tmp_path / "dotted_part.py").write_text(
        "def build(num_classes):\n    import torch\n    return torch.nn.Flatten()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("no_such_part", "imports: no_such_part is not installed; do: install it"),
        ("needing_part", "imports: needing_part needs no_such_library; do: install it"),
        ("broken_part", "imports: broken_part cannot be imported: ZeroDivisionError: division by zero"),
        ("../part", r"imports: '\.\./part' is not the name of a module"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            parts.import_parts([name])
        assert "\n" not in str(caught.value)
    sets = ["data.train=a", "data.val=b"]
    with pytest.raises(ConfigError, match="'dotted_part:build' is code of a package; add 'dotted_part' to imports"):
        load_config("fashion_mnist_s90", [*sets, "model.name='dotted_part:build'", "model.args={}"])
    assert "dotted_part" not in sys.modules
    config = load_config(
        "fashion_mnist_s90", [*sets, "imports=[dotted_part]", "model.name='dotted_part:build'", "model.args={}"]
    )
    assert isinstance(models.build(config.model.name, num_classes=2), torch.nn.Flatten)
    with pytest.raises(ConfigError, match="has no attribute 'nothing'"):
        models.build("dotted_part:nothing")
    with pytest.raises(ConfigError, match=r"sparsity\.grow: 'gradeint' is not one of .*; did you mean 'gradient'"):
        load_config("fashion_mnist_s90", [*sets, "imports=[dotted_part]", "sparsity.grow=gradeint"])


def test_the_tables_hold_what_the_schema_lists() -> None:
    for key in REGISTRIES:
        if key == "model.name":
            assert not set(OWN_MODELS) & set(MODELS)
        else:
            assert set(KEYS[key].choices) <= set(choices_of(key)), key

"""``python -m pipeline.tickets`` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from benchmarks.support.samples import sample_provenance
from pipeline import models
from pipeline.errors import IntegrityError
from pipeline.inference import TicketNetwork
from pipeline.sparse.layers import sparse_weights
from pipeline.tickets.__main__ import main
from pipeline.tickets.format import Ticket, decode, ticket_of
from pipeline.tickets.network import Network
from pipeline.tickets.store import TicketStore

MakeTicket = Callable[..., Ticket]


@pytest.fixture
def folder(make_ticket: MakeTicket, tmp_path: Path) -> Path:
    store = TicketStore(tmp_path / "tickets", owner="run-1")
    for index in (0, 1):
        store.save(make_ticket(index, seed=index))
    return store.folder


def test_ls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(folder)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["index", "phase", "method", "epochs", "density", "R_s", "bytes", "sha256", "file"]
    size = (folder / "ticket-000.safetensors").stat().st_size
    digest = TicketStore(folder).list()[0].content_digest
    assert first.split() == [
        "0",
        "exploration",
        "rigl",
        "2.5",
        "0.25",
        "0.500",
        f"{size:,}",
        digest[:12],
        f"{folder}/ticket-000.safetensors",
    ]
    assert second.split()[0] == "1"
    assert main(["ls", "--json", str(folder)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (
        [each["index"] for each in listed] == [0, 1] and listed[0]["sha256"] == digest and listed[0]["model"] == "tiny"
    )


def test_show(folder: Path, make_ticket: MakeTicket, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{folder}/ticket-001.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "num_active         11\n" in shown and f"sha256             {make_ticket(1, seed=1).content_digest}" in shown
    assert shown.splitlines()[-2].split() == ["conv.weight", "4×5×2×1", "8", "0.2000"]
    assert main(["show", "--json", f"{folder}/ticket-001.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][1] == {
        "name": "fc.weight",
        "shape": [2, 3],
        "active": 3,
        "density": 0.5,
    }


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]
    content = bytearray((folder / "ticket-001.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "ticket-001.safetensors").write_bytes(content)
    assert main(["verify", str(folder)]) == 78
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["ok", "BAD"]
    assert output.err == "ERROR[78] 1 of 2 files are not intact tickets; do: restore them from a copy\n"


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_export_dense(
    folder: Path, make_ticket: MakeTicket, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"dense.{ending}"
    arguments = ["export", f"{folder}/ticket-001.safetensors", "--output", str(output)]
    assert main(arguments) == 0
    state = safetensors.torch.load_file(output) if ending == "safetensors" else torch.load(output, weights_only=True)
    expected = make_ticket(1, seed=1).state
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in expected.items()
    )
    assert main(arguments) == 73  # nothing is overwritten
    assert "already exists" in capsys.readouterr().err


def described_ticket(args: dict[str, int]) -> Ticket:
    """Make a ticket whose first convolution has every second weight active."""
    model = models.build("cifar_resnet8", num_classes=10, args=args, seed=1)
    name, weight = next(iter(sparse_weights(model).items()))
    mask = torch.arange(weight.numel()).view(weight.shape) % 2 == 0
    with torch.no_grad():
        weight.mul_(mask)
    prepared = {"eval_resolution": 28, "eval_ratio": 1.0, "mean": [10.0, 20.0, 30.5], "std": [4.0, 5.0, 6.0]}
    provenance = sample_provenance(model="cifar_resnet8", model_args=args, num_classes=10, preprocessing=prepared)
    network = Network(tuple("abcdefghij"), sum(p.numel() for p in model.parameters()), 0.75, {})
    return ticket_of(model, {name: mask}, provenance=provenance, network=network)


def check_description(metadata: dict[str, str], ticket: Ticket) -> None:
    assert metadata["exported_from"] == ticket.content_digest and "ticket" not in metadata
    found = {key: json.loads(metadata[key]) for key in ("mean", "std", "eval_resolution", "eval_ratio", "classes")}
    assert found == {**ticket.provenance.preprocessing, "classes": list("abcdefghij")}
    assert [json.loads(metadata[key]) for key in ("density", "network_density", "num_classes")] == [0.5, 0.75, 10]
    assert metadata["model"] == "cifar_resnet8" and json.loads(metadata["model_args"])["width"] == 4


def test_an_export_says_how_it_is_used_and_is_not_taken_for_a_ticket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket = described_ticket({"width": 4})
    path = TicketStore(tmp_path / "run", owner="run-1").save(ticket)
    output = tmp_path / "exports" / "a.safetensors"
    output.parent.mkdir()
    assert main(["export", str(tmp_path / "run"), "--output", str(output)]) == 0
    with safe_open(output, framework="pt") as file:
        check_description(file.metadata(), ticket)
    for command in (["show", str(output)], ["verify", str(output)], ["diff", str(path), str(output)]):
        assert main(command) == 78
    assert "is not an intact ticket: it is a dense export of a ticket: its metadata has no 'ticket'" in (
        capsys.readouterr().err
    )
    store = TicketStore(output.parent)
    assert store.list() == [] and len(store.left_out) == 1


def test_export_to_onnx_names_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        pytest.skip("nothing is missing")
    assert main(["export", f"{folder}/ticket-000.safetensors", "--output", str(tmp_path / "a.onnx")]) == 69
    assert "python -m pip install onnx" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()


def test_export_to_onnx(tmp_path: Path) -> None:
    """The exported network predicts what the ticket's network predicts."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ticket = described_ticket({"width": 4, "stem_stride": 2})
    model = TicketNetwork(ticket)
    path = TicketStore(tmp_path / "real", owner="run-1").save(ticket)
    assert main(["export", str(path), "--output", str(tmp_path / "a.onnx")]) == 0
    exported = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(exported)
    check_description({each.key: each.value for each in exported.metadata_props}, ticket)
    with pytest.raises(IntegrityError, match="is not an intact ticket"):
        decode(tmp_path / "a.onnx")
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    from onnx.reference import ReferenceEvaluator

    (logits,) = ReferenceEvaluator(exported).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "code"), [({"width": 16}, 65), ({"width": 10**6}, 64), ({"checkpoint_path": "/etc/passwd"}, 64)]
)
def test_export_to_onnx_builds_nothing_that_does_not_fit(
    folder: Path, make_ticket: MakeTicket, tmp_path: Path, args: dict[str, object], code: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find_spec("json" if name.startswith("onnx") else name, *more)
    )
    path = TicketStore(tmp_path / "hostile", owner="run-1").save(make_ticket(0, model="cifar_resnet8", model_args=args))
    assert main(["export", str(path), "--output", str(tmp_path / "a.onnx")]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"{folder}/ticket-00{index}.safetensors" for index in (0, 1)]
    assert main(["diff", "--json", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_content"] is False and found["mask_overlap"] == 1.0 and found["in_both"] == 11
    one, other = (decode(path).state for path in files)
    squares = [
        float((one[name].double() - other[name].double()).square().sum())
        for name in ("conv.weight", "fc.weight", "fc.bias")
    ]
    assert found["weight_distance"] == pytest.approx(sum(squares) ** 0.5)
    assert main(["diff", *files]) == 0
    assert "mask_overlap     1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "COMMAND"),
        (["lst"], 64, "invalid choice: 'lst'"),
        (["show"], 64, "FILE"),
        (
            ["export", "a.safetensors", "--output", "a.bin"],
            64,
            "expected a name that ends in one of .safetensors, .pt, .onnx",
        ),
        (["ls", "/nowhere"], 65, "/nowhere: is not a folder"),
        (["show", "/nowhere.safetensors"], 65, "does not exist"),
        (["verify", "/nowhere.safetensors"], 78, "1 of 1 files"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ERROR[{code}] ") and message in line


def test_help_comes_before_anything_heavy() -> None:
    code = "import sys; from pipeline.tickets.__main__ import main; main(['show']); "
    code += "print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

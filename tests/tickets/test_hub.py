"""Tickets that are published: the real client of the Hugging Face Hub with a stand-in server, and other places."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

from pipeline.errors import ConfigError, DataError
from pipeline.tickets.__main__ import main
from pipeline.tickets.card import measured_in, published_files
from pipeline.tickets.export import export
from pipeline.tickets.format import Ticket, encode
from pipeline.tickets.hub import require_place
from pipeline.tickets.store import TicketStore
from tests.support.hub_server import TOKEN, running_hub
from tests.support.launch import ROOT

MakeTicket = Callable[..., Ticket]
FILES = ["README.md", "config.json", "model.safetensors", "ticket.safetensors"]

# In a process of its own, because the client reads its settings when it is imported.
SESSION = """
import os, sys
from pipeline.tickets.__main__ import main

run, other, folder = sys.argv[1:]
codes = [
    main(["push", run, "hf://me/sparse", "--dataset", "Digits", "--license", "mit"]),
    main(["pull", "hf://me/sparse", "--output", f"{folder}/one.safetensors"]),
    main(["push", other, "hf://me/sparse", "--public"]),
    main(["ls", "hf://me/sparse"]),
    main(["pull", "hf://me/sparse/ticket.safetensors", "--output", f"{folder}/two.safetensors"]),
    main(["pull", "hf://me/nowhere", "--output", f"{folder}/three.safetensors"]),
]
os.environ["HF_TOKEN"] = "hf_wrong"
codes.append(main(["push", run, "hf://me/other"]))
print("CODES", codes, "hostile_part" in sys.modules)
"""


def run_folder(folder: Path, ticket: Ticket) -> Path:
    """Make a run of one ticket and its report."""
    path = TicketStore(folder / "tickets", owner="run-1").save(ticket)
    rows = [row_of(ticket, "ticket-0", 0.5), row_of(ticket, "superposition-mean", 0.75)]
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps({"rows": rows, "num_images": 200}))
    return path


def row_of(ticket: Ticket, name: str, top1: float) -> dict[str, Any]:
    facts = {"density": ticket.density, "num_parameters": ticket.num_parameters}
    return {"name": name, "kind": "ticket", "top1": top1, "nll": 0.25, "training_flops_ratio": None} | facts


def test_push_and_pull_with_the_hubs_client(make_ticket: MakeTicket, tmp_path: Path) -> None:
    """What is pulled is the ticket bit for bit; the hub's own reader understands the card; no file chooses code."""
    (tmp_path / "hostile_part.py").write_text("")
    ticket, hostile = make_ticket(0), make_ticket(0, seed=1, model="hostile_part:build", model_args={})
    hostile = dataclasses.replace(
        hostile, provenance=dataclasses.replace(hostile.provenance, origin={"imports": {"hostile_part": "1"}})
    )
    path, other = run_folder(tmp_path / "run", ticket), run_folder(tmp_path / "other", hostile)
    with running_hub() as hub:
        environ = {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }
        environ |= {"PYTHONPATH": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SESSION, tmp_path / "run", tmp_path / "other", tmp_path],
            cwd=ROOT, env=dict(os.environ) | environ, capture_output=True, text=True,
        )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CODES")] or [done.stderr[-3000:]]
    assert line == "CODES [0, 0, 0, 0, 0, 65, 77] False"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert errors == [
        "ERROR[65] hf://me/nowhere: does not exist; do: pass a folder of tickets",
        "ERROR[77] hf://me/other: refused with status 401: Invalid username or password.; "
        "do: log in with hf auth login or set HF_TOKEN, and check the owner's name",
    ]
    assert "hf://me/sparse/ticket.safetensors" in done.stdout  # ls names the ticket, and not the dense network
    assert (tmp_path / "one.safetensors").read_bytes() == path.read_bytes()
    assert (tmp_path / "two.safetensors").read_bytes() == other.read_bytes()

    assert hub.private == {"me/sparse": True}  # a repository that exists keeps its visibility
    _, first, _ = hub.commits["me/sparse"]  # one commit for each push
    assert sorted(first) == FILES and first["ticket.safetensors"] == path.read_bytes()
    dense = safetensors.torch.load(first["model.safetensors"])
    assert dense.keys() == ticket.state.keys()
    assert all(torch.equal(dense[name], tensor) for name, tensor in ticket.state.items())
    card = ModelCard(first["README.md"].decode()).data
    said = card.to_dict()
    assert (said["library_name"], said["license"]) == ("ticketworks", "mit")
    assert said["tags"] == ["sparse", "sparse-training", "rigl"]
    found = {each.metric_type: (each.metric_value, each.dataset_name) for each in card.eval_results}
    assert found == {"accuracy": (0.5, "Digits"), "nll": (0.25, "Digits")}
    assert "| 50.00 | 0.2500 |\n" in first["README.md"].decode()
    config = json.loads(first["config.json"])
    assert (config["model"], config["num_active"], config["ticket_sha256"]) == ("tiny", 11, ticket.content_digest)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_other_places_hold_the_same_files_and_keep_their_ticket(
    kind: str, make_ticket: MakeTicket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"memory://{uuid.uuid4().hex}/a" if kind == "memory" else str(tmp_path / "a")
    paths = [run_folder(tmp_path / name, make_ticket(0, seed=seed)) for seed, name in enumerate(("one", "other"))]
    assert main(["push", str(paths[0]), place]) == main(["push", str(paths[0]), place]) == 0
    files, root = fsspec.core.url_to_fs(place)
    assert sorted(Path(path).name for path in files.ls(root, detail=False)) == FILES
    assert main(["push", str(paths[1]), place]) == 78
    assert "has another ticket" in capsys.readouterr().err
    assert main(["verify", place]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # the dense network beside it is no candidate
    pulled = tmp_path / "pulled.safetensors"
    assert main(["pull", place, "--output", str(pulled)]) == 0
    assert pulled.read_bytes() == paths[0].read_bytes()
    assert main(["pull", place, "--output", str(pulled)]) == 73
    assert main(["pull", place, "--output", str(tmp_path / "a.pt")]) == 64


def test_the_extra_is_named_where_the_client_is_missing(
    make_ticket: MakeTicket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "huggingface_hub" else find_spec(name, *more)
    )
    path = run_folder(tmp_path / "run", make_ticket(0))
    assert main(["push", str(path), "hf://me/sparse"]) == 69

    def no_file_system(*_: object, **__: object) -> None:
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_file_system)
    assert main(["show", "hf://me/sparse"]) == 69
    line = "ERROR[69] hf://me/sparse: needs huggingface_hub, which is not installed; do: pip install -e '.[hub]'"
    assert capsys.readouterr().err.splitlines() == [line, line]
    with pytest.raises(ConfigError, match="is not the address of a model; do: write it as hf://owner/name"):
        require_place("hf://sparse")


def test_metrics_are_those_of_this_very_ticket(make_ticket: MakeTicket, tmp_path: Path) -> None:
    ticket = make_ticket(0)
    report = tmp_path / "report.json"
    rows = [row_of(ticket, "a-ticket-0", 0.5), row_of(ticket, "b-ticket-0", 0.25) | {"num_parameters": 12}]
    report.write_text(json.dumps({"rows": rows, "num_images": 200}))
    assert measured_in(report, ticket, "ticket-0").values == {"top1": 0.5, "nll": 0.25}
    report.write_text(json.dumps({"rows": [*rows, row_of(ticket, "c-ticket-0", 0.1)], "num_images": 200}))
    with pytest.raises(DataError, match=r"has 2 rows of this ticket-0, expected 1"):
        measured_in(report, ticket, "ticket-0")
    for content in ("[]", "{}", '{"rows": [{}]}', "{"):
        report.write_text(content)
        with pytest.raises(DataError, match="is not a report"):
            measured_in(report, ticket, "ticket-0")
    with pytest.raises(DataError, match="does not exist"):
        measured_in(tmp_path / "nowhere.json", ticket, "ticket-0")


def test_equal_tickets_give_equal_files_and_text_of_a_ticket_is_only_text(make_ticket: MakeTicket) -> None:
    ticket = make_ticket(0, parent_run="<b>|`x`\n---\nlicense: mit", method="a: [b")
    assert len({export(ticket, ".safetensors") for _ in range(8)}) == 1
    files = published_files(encode(ticket), address="hf://me/sparse")
    card = ModelCard(files["README.md"].decode())
    assert card.data.license is None and card.data.tags[-1] == "a: [b"
    assert "| run | \\<b\\>\\|\\`x\\`---license: mit, ticket 0 |\n" in card.text

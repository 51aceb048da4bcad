"""Every entry of the zoo can be loaded and evaluated by its name, and stays within the limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launchers import evaluate_cli
from pipeline import zoo
from pipeline.errors import ConfigError, DataError, IntegrityError, WriteError
from pipeline.inference import load_ticket
from pipeline.tickets import TicketStore
from pipeline.verification.bundle import check_manifest
from tools.zoo import COLUMNS, MAX_TICKET_BYTES, MAX_ZOO_BYTES, add, main, page, size_of

ENTRIES = zoo.entries()
DEMO = zoo.FOLDER / "fashion_mnist_s90"


def test_the_zoo_has_entries_and_its_page_is_current() -> None:
    assert "fashion_mnist_s90" in ENTRIES
    assert (zoo.FOLDER / "README.md").read_text() == page(zoo.FOLDER), "run python -m tools.zoo page"
    assert size_of(zoo.FOLDER) <= MAX_ZOO_BYTES
    folders = {path.name for path in zoo.FOLDER.iterdir() if path.is_dir()}
    assert folders == set(ENTRIES)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_is_whole_and_its_tickets_load_by_name(name: str) -> None:
    check_manifest(zoo.find(name), name)
    tickets = zoo.tickets(name)
    assert set(tickets) == set(ENTRIES[name]["networks"])  # type: ignore[call-overload]
    for ticket, path in tickets.items():
        assert path.stat().st_size <= MAX_TICKET_BYTES
        network = load_ticket(f"{name}/{ticket}")
        side = network.resolution
        assert network(torch.zeros(1, 3, side, side)).shape == (1, len(network.classes))
    assert load_ticket(name).ticket.content_digest == load_ticket(next(iter(tickets.values()))).ticket.content_digest
    assert [ref.index for ref in TicketStore(Path(evaluate_cli.from_zoo(name))).list()]


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_no_path_of_the_trainers_machine_is_published(name: str) -> None:
    for path in zoo.find(name).rglob("*"):
        if path.suffix in (".yaml", ".json", ".jsonl", ".txt"):
            text = path.read_text()
            assert not [
                start for start in ("/work", "/tmp", "/root", "/home") if f'"{start}/' in text or f" {start}/" in text
            ]


def test_other_places_are_left_as_they_are(tmp_path: Path) -> None:
    for place in ("s3://bucket/fashion_mnist_s90", str(tmp_path), "no-such-entry"):
        assert evaluate_cli.from_zoo(place) == place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "zoo"
    folder.mkdir()
    yield folder


def test_a_run_becomes_an_entry(folder: Path) -> None:
    added = add(DEMO, "boots", ticket="ticket-001", data="boots", num_checkpoints=0, folder=folder)
    assert added == folder / "boots"
    assert not (added / "checkpoints").exists()
    (entry,) = zoo.entries(folder).values()
    assert entry["networks"] == ENTRIES["fashion_mnist_s90"]["networks"]
    assert zoo.find_ticket("boots", folder) == added / "tickets" / "ticket-001.safetensors"
    text = page(folder)
    row = entry["networks"]["ticket-001"]  # type: ignore[index]
    assert f"| [boots](#boots) | boots | {100 * row['top1']:.2f} |" in text
    assert text.count(COLUMNS["nll"][0]) == 2  # of the table of entries, and of the card
    assert 'load_ticket("boots")' in text


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"name": "Boots"}, ConfigError, "--name Boots: is not a name of lower-case letters"),
        ({"ticket": "ticket-009"}, ConfigError, "--ticket ticket-009: is not one of superposition-mean, ticket-000"),
        ({"run": "/nowhere"}, DataError, "/nowhere"),
    ],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing(
    changes: dict[str, str], kind: type[Exception], message: str, folder: Path
) -> None:
    given = {"run": str(DEMO), "name": "boots", "ticket": "ticket-000"} | changes
    with pytest.raises(kind, match=message):
        add(Path(given["run"]), given["name"], ticket=given["ticket"], data="", num_checkpoints=0, folder=folder)
    assert not list(folder.iterdir())


def test_limits_and_names_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(name: str = "boots") -> None:
        add(DEMO, name, ticket="ticket-000", data="", num_checkpoints=0, folder=folder)

    monkeypatch.setattr("tools.zoo.MAX_TICKET_BYTES", 1000)
    with pytest.raises(WriteError, match=r"\.safetensors: has .* bytes, expected at most 1,000 in the zoo; do: train"):
        attempt()
    monkeypatch.undo()
    monkeypatch.setattr("tools.zoo.MAX_ZOO_BYTES", 100_000)
    with pytest.raises(WriteError, match=r"would have .* bytes, expected at most 100,000; do: publish fewer"):
        attempt()
    monkeypatch.undo()
    assert not list(folder.iterdir())
    attempt()
    with pytest.raises(ConfigError, match="--name boots: is in the zoo already"):
        attempt()
    run = tmp_path / "run"
    shutil.copytree(DEMO, run)
    lines = (run / "chain.jsonl").read_text().splitlines(keepends=True)
    (run / "chain.jsonl").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(IntegrityError):
        add(run, "other", ticket="ticket-000", data="", num_checkpoints=0, folder=folder)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["boots"]


def test_the_command_writes_index_and_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "FOLDER", folder)
    given = ["add", str(DEMO), "--name", "boots", "--ticket", "ticket-000", "--data", "boots", "--checkpoints", "0"]
    assert main(given) == 0
    assert f"of {MAX_ZOO_BYTES:,}" in capsys.readouterr().out
    assert list(json.loads((folder / "index.json").read_text())["entries"]) == ["boots"]
    assert (folder / "README.md").read_text() == page(folder)


def test_the_place_of_the_run_is_not_published(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(DEMO, run)
    log = (DEMO / "metrics.jsonl").read_text()
    there = log.replace("pipeline.tracking open runs/fashion_mnist_s90", f"pipeline.tracking open {run}")
    assert there != log
    (run / "metrics.jsonl").write_text(there)
    added = add(run, "boots", ticket="ticket-000", data="", num_checkpoints=0, folder=folder)
    assert (added / "metrics.jsonl").read_text() == log

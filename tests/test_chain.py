"""The chain: links by hand, resuming, and every edit of a line that is found."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.chain import REPORT, TICKET, Chain, link_of, position_problem, read_chain
from pipeline.errors import IntegrityError

START: dict[str, Any] = {
    "format": 1,
    "config_digest": "c",
    "settings": {},
    "data": {"train": "t"},
    "ranks": 1,
    "environment": {"torch": "2"},
}


def three_records(path: Path) -> Chain:
    chain = Chain(path)
    chain.start(0, **START)
    chain.note(3, {"train/loss": 0.5})
    chain.add(REPORT, 4, state="a")
    chain.add(TICKET, 4, tickets={"last": "b"})
    return chain


def test_a_link_is_the_sha256_of_the_link_before_and_of_the_record(tmp_path: Path) -> None:
    three_records(tmp_path / "c")
    first, second, _ = (json.loads(line) for line in (tmp_path / "c").read_text().splitlines())
    text = '{"kind":"report","metrics":{"3":{"train/loss":0.5}},"state":"a","step":4}'
    assert second["link"] == hashlib.sha256(f"{first['link']}\n{text}".encode()).hexdigest()
    assert read_chain(tmp_path / "c")[1] == second


def test_a_resumed_chain_ends_with_the_bytes_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def finish(chain: Chain) -> None:
        chain.note(6, {"train/loss": float("nan")})
        chain.add(REPORT, 8, state="d")

    whole = three_records(tmp_path / "whole")
    whole.note(5, {"mask/r_s": 0.25})
    finish(whole)
    stopped = three_records(tmp_path / "stopped")
    stopped.note(5, {"mask/r_s": 0.25})
    saved = json.loads(json.dumps(stopped.position()))
    assert position_problem(saved) == ""
    stopped.note(6, {"train/loss": 7.0})  # of the course that is abandoned
    stopped.add(REPORT, 8, state="another")
    resumed = Chain(tmp_path / "stopped", saved)
    resumed.start(4, **START)  # nothing has changed: no record
    finish(resumed)
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes()
    assert read_chain(tmp_path / "whole")[-1]["metrics"] == {"5": {"mask/r_s": 0.25}, "6": {"train/loss": "nan"}}
    resumed.start(8, **START | {"ranks": 2})
    assert [record["kind"] for record in read_chain(tmp_path / "stopped")].count("start") == 2


def test_a_chain_without_the_records_of_the_checkpoint_starts_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = three_records(tmp_path / "c").position()
    lines = (tmp_path / "c").read_text().splitlines(keepends=True)
    (tmp_path / "c").write_text("".join(lines[:2]))
    chain = Chain(tmp_path / "c", saved)
    assert chain.is_new
    assert "does not begin with the 3 records of the checkpoint; a new chain starts here" in caplog.text
    chain.start(4, **START)
    assert [(record["kind"], record["step"]) for record in read_chain(tmp_path / "c")] == [("start", 4)]


EDITS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a number": (lambda lines: [*lines[:1], lines[1].replace("0.5", "0.4"), *lines[2:]], "line 2: its link is not"),
    "a line less": (lambda lines: [lines[0], *lines[2:]], "line 2: its link is not"),
    "the first line": (lambda lines: lines[1:], "line 1: "),
    "two lines swapped": (lambda lines: [lines[0], lines[2], lines[1]], "line 2: its link is not"),
    "an earlier step": (lambda lines: [*lines, lines[1].replace('"step":4', '"step":1')], "step 1 comes after step 4"),
    "a cut": (lambda lines: [*lines[:2], lines[2][:-5]], "line 3 has no end"),
    "a space": (lambda lines: [lines[0].replace(":", ": ", 1), *lines[1:]], "not written in the form that is hashed"),
    "another kind": (lambda lines: [*lines[:2], lines[2].replace("ticket", "basket", 1)], "kind: expected one of"),
    "a field more": (lambda lines: [lines[0].replace("{", '{"a":1,', 1), *lines[1:]], "'a' is not a field"),
    "no JSON": (lambda lines: [lines[0], "{\n"], "line 2: "),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_line_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c"
    three_records(path)
    edit, expected = EDITS[name]
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))
    with pytest.raises(IntegrityError, match=re.escape(expected)):
        read_chain(path)


def test_a_chain_that_is_computed_anew_is_read_and_ends_with_another_link(tmp_path: Path) -> None:
    """Which is why segments are run again: the chain alone proves that the log is of one piece."""
    three_records(tmp_path / "c")
    records = read_chain(tmp_path / "c")
    last, link = records[-1]["link"], ""
    records[1]["metrics"]["3"]["train/loss"] = 0.1
    for record in records:
        link = record["link"] = link_of(link, record)
    lines = [json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n" for record in records]
    (tmp_path / "c").write_text("".join(lines))
    assert read_chain(tmp_path / "c")[-1]["link"] == link != last


@pytest.mark.parametrize(
    "position", [[1], {"link": "a"}, {"link": "a", "num_records": -1, "pending": {}}, {"link": "a", "num_records": 1}]
)
def test_a_position_of_another_form_is_named(position: object) -> None:
    assert position_problem(position).startswith("chain: ")

"""The zoo's index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline import zoo
from pipeline.errors import ConfigError, DataError, IntegrityError


def make_zoo(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"a bundle")
    (folder / "b").mkdir()
    (folder / "b" / "manifest.json").write_bytes(b"{}")
    entries = {
        "rigl-s90": {"bundle": "a.tar", "sha256": hashlib.sha256(b"a bundle").hexdigest()} | changes,
        "set-s90": {"bundle": "b", "sha256": hashlib.sha256(b"{}").hexdigest(), "card": "b.md"},
    }
    (folder / "index.json").write_text(json.dumps({"entries": entries}))
    return folder


def test_an_entry_is_a_file_or_a_folder(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path / "zoo")
    assert zoo.find("rigl-s90", folder) == folder / "a.tar"
    assert zoo.find("set-s90", folder) == folder / "b"
    assert zoo.entries(folder)["set-s90"]["card"] == "b.md"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = make_zoo(tmp_path / "zoo")
    with pytest.raises(
        ConfigError, match=r"rigl-s9: is not a folder, a bundle or an entry of the zoo; do: pass one of "
    ):
        zoo.find("rigl-s9", folder)
    with pytest.raises(ConfigError, match=r"a: is not .*; do: pass the folder of a run"):
        zoo.find("a", tmp_path / "nowhere")
    (folder / "a.tar").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"a.tar: has sha256 .*, expected .* as in the index"):
        zoo.find("rigl-s90", folder)
    outside = make_zoo(tmp_path / "other", bundle="../zoo/a.tar")
    with pytest.raises(IntegrityError, match="is outside the zoo"):
        zoo.find("rigl-s90", outside)
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index.json: 'entries' is missing"):
        zoo.entries(folder)

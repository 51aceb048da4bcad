"""51 bad tickets and 20 bad checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaigns.cases import CONFIG, DATA, INTEGRITY, Case, Good
from tests.campaigns.materials import write_manifest

Edit = Callable[[bytes], bytes]
DTYPES = {"F32": "float32", "U8": "uint8", "I64": "int64"}


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Split a good ticket into (safetensors header, ticket header, body)."""
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    return entries, json.loads(entries["__metadata__"]["ticket"]), content[8 + length :]


def joined(entries: dict[str, Any], header: dict[str, Any] | str, body: bytes, *, is_signed: bool = True) -> bytes:
    """Join what ``parts`` split; ``is_signed``: with a new digest, as an attacker would write it."""
    if isinstance(header, dict) and is_signed:
        header = {key: value for key, value in header.items() if key != "content_sha256"}
        sha = hashlib.sha256(json.dumps(header, separators=(",", ":")).encode())
        for name in sorted(set(entries) - {"__metadata__"}):
            entry = entries[name]
            sha.update(f"\n{name} {DTYPES.get(entry['dtype'], entry['dtype'])} {entry['shape']}\n".encode())
            sha.update(body[slice(*entry["data_offsets"])])
        header |= {"content_sha256": sha.hexdigest()}
    text = header if isinstance(header, str) else json.dumps(header)
    head = json.dumps(entries | {"__metadata__": {"ticket": text}}).encode()
    return struct.pack("<Q", len(head)) + head + body


def _provenance(**changes: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        header["provenance"] |= changes
        return joined(entries, header, body)

    return edit


def _header(**changes: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        return joined(entries, header | changes, body)

    return edit


def _entry(name: str, **changes: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        entries[name] |= changes
        return joined(entries, header, body)

    return edit


def _layout(name: str, **changes: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        header["tensors"][name] |= changes
        return joined(entries, header, body)

    return edit


def _body(name: str, value: bytes, offset: int = 0) -> Edit:
    """Return an edit that replaces bytes of a tensor and updates the digest."""

    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        start = entries[name]["data_offsets"][0] + offset
        return joined(entries, header, body[:start] + value + body[start + len(value) :])

    return edit


def _network(**changes: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        entries, header, body = parts(content)
        header["network"] |= changes
        return joined(entries, header, body)

    return edit


def _raw_header(text: str) -> Edit:
    return lambda content: joined(parts(content)[0], text, parts(content)[2])


def _pickle(_: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'id'\ntR.")
    return content.getvalue()


TICKETS: tuple[tuple[str, str, Edit], ...] = (
    ("empty", "truncated", lambda _: b""),
    ("a pickle in a zip", "truncated or is not a safetensors", _pickle),
    ("a bare pickle", "truncated or is not a safetensors", lambda _: b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    ("cut", "bytes, but the header describes", lambda content: content[:-7]),
    ("cut in the header", "truncated", lambda content: content[:100]),
    ("longer", "bytes, but the header describes", lambda content: content + b"x"),
    (
        "a bit of a weight",
        "the sha256 of its content",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    ),
    ("zeros", "header is not valid JSON", lambda content: bytes(len(content))),
    ("a header of 2^63 bytes", "truncated", lambda content: struct.pack("<Q", 2**63) + content[8:]),
    ("a header that is no JSON", "header is not valid JSON", lambda content: content[:8] + b"!" + content[9:]),
    ("100,000 brackets", "nested too deeply", lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000),
    (
        "no ticket in it",
        "not a ticket",
        lambda content: joined(parts(content)[0], "", parts(content)[2]).replace(b'"ticket"', b'"other!"'),
    ),
    ("its header is a list", "ticket header: expected a JSON object, got a list", _raw_header("[]")),
    ("a name twice", "the name 'format' appears twice", _raw_header('{"format": 1, "format": 1}')),
    ("NaN", "NaN is not allowed", _raw_header('{"format": NaN}')),
    ("infinity", "is not a finite number", _raw_header('{"format": 1e999}')),
    ("half a character", "contains an unpaired surrogate", _raw_header('{"format": "\\ud800"}')),
    (
        "format 3",
        "got 3: it was written by another version of ticketworks; do: use the version of ticketworks that wrote them",
        _header(format=3),
    ),
    ("format true", "expected ticket format 1 or 2, got true", _header(format=True)),
    ("minor -1", "minor format version: expected a whole number >= 0, got -1", _header(minor=-1)),
    ("an unknown field", "unknown field 'licence'", _header(licence="none")),
    ("a class too many", "network: classes: expected at most 3 names, got 4", _network(classes=["a"] * 4)),
    (
        "a number for a class",
        "classes: expected every entry to be text of at most 1000 characters, got the entry 1",
        _network(classes=[1]),
    ),
    ("more parameters than tensors", "parameters: expected 40 to 50, got 51", _network(parameters=51)),
    ("a network twice as dense", "network: density: expected 0 to 1, got 2", _network(density=2)),
    (
        "a dense weight with a mask",
        "expected only parameters that have no mask, got 'fc.weight'",
        _network(dense={"fc.weight": "me"}),
    ),
    ("no provenance", "provenance: expected a JSON object, got null", _header(provenance=None)),
    ("index -1", "index: expected 0 to 9223372036854775807, got -1", _provenance(index=-1)),
    ("a step of 2^63", "got 9223372036854775808", _provenance(step=2**63)),
    ("text for the seed", 'seed: expected a whole number, got "0"', _provenance(seed="0")),
    ("density 2", "density: expected 0 to 1, got 2", _provenance(density=2)),
    ("one field more", "unknown field 'more'", _provenance(more=1)),
    (
        "text for the resolution",
        'preprocessing: eval_resolution: expected a whole number from 1 to 65536, got "28"',
        _provenance(preprocessing={"eval_resolution": "28"}),
    ),
    (
        "a colour of deviation 0",
        "preprocessing: std: expected three positive numbers, got a list",
        _provenance(preprocessing={"std": [1.0, 1.0, 0]}),
    ),
    (
        "a path for a name",
        "'../../w' is not a valid tensor name",
        _header(tensors={"../../w": {"kind": "parameter", "shape": []}}),
    ),
    ("unknown kind", 'or buffer, got "code"', _layout("fc.bias", kind="code")),
    ("an impossible shape", "got [-10, -4]", _layout("fc.weight", shape=[-10, -4])),
    ("a shape of 2^60", "got [1152921504606846976]", _layout("fc.weight", shape=[2**60])),
    ("a network of petabytes", "does not fit the shape", _layout("fc.weight", shape=[2**40, 2**10])),
    ("objects", "dense/fc.bias': dtype: expected one of", _entry("dense/fc.bias", dtype="OBJ")),
    ("overlapping tensors", "starts at byte 4, expected", _entry("dense/fc.bias", data_offsets=[4, 44])),
    ("offsets beyond the end", "not an intact ticket", _entry("dense/fc.bias", data_offsets=[2**40, 2**40 + 40])),
    ("a tensor too many", "unexpected tensors", lambda content: _more(content)),
    ("a bit more in the mask", "active weights, but", _body("mask/fc.weight", b"\xff")),
    ("NaN in a bias", "a value that is not finite", _body("dense/fc.bias", b"\x00\x00\xc0\x7f")),
    ("infinite weight", "a value that is not finite", _body("values/fc.weight", b"\x00\x00\x80\x7f")),
)


def _more(content: bytes) -> bytes:
    entries, header, body = parts(content)
    entries["dense/stowaway"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    return joined(entries, header, body + bytes(4))


def _ticket(edit: Edit) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        (folder / "tickets").mkdir()
        (folder / "tickets" / "ticket-000.safetensors").write_bytes(edit(good.ticket))
        return good.evaluate(folder / "tickets")

    return make


def _linked(good: Good, folder: Path) -> list[str]:
    (folder / "tickets").mkdir()
    (folder / "tickets" / "ticket-000.safetensors").symlink_to(good.root / "tickets" / "ticket-000.safetensors")
    return good.evaluate(folder / "tickets")


def _ticket_fifo(good: Good, folder: Path) -> list[str]:
    (folder / "tickets").mkdir()
    os.mkfifo(folder / "tickets" / "ticket-000.safetensors")
    return good.evaluate(folder / "tickets")


def _two_with_one_index(good: Good, folder: Path) -> list[str]:
    _ticket(lambda content: content)(good, folder)
    (folder / "tickets" / "ticket-001.safetensors").write_bytes(_provenance(step=7)(good.ticket))
    return good.evaluate(folder / "tickets")


# -- checkpoints


def _files(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return an edit that replaces or removes one file."""
    return lambda folder: (folder / name).unlink() if content is None else _write(folder / name, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _state(**changes: Any) -> Callable[[Path], None]:
    """Return an edit that changes entries of state.json and updates the manifest."""

    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | changes))
        write_manifest(folder)

    return change


def _replaced(name: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.copy(folder / name, folder.parent / name)
        (folder / name).unlink()
        put(folder / name)

    return change


CHECKPOINTS: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
    ("without manifest", "manifest.json is missing", _files("manifest.json", None)),
    ("without state", "state.json", _files("state.json", None)),
    ("without a rank's file", "rank-1.safetensors", _files("rank-1.safetensors", None)),
    ("a byte of the weights", "state.safetensors: expected sha256", _files("state.safetensors", b"other")),
    ("an empty manifest", "manifest.json is not valid JSON", _files("manifest.json", b"")),
    ("a manifest that is a list", "lists no files", _files("manifest.json", b"[]")),
    ("a manifest of nothing", "its manifest lists no files", _files("manifest.json", b'{"files": {}}')),
    (
        "100,000 brackets",
        "manifest.json is not valid JSON: it is nested too deeply",
        _files("manifest.json", b"[" * 100_000),
    ),
    (
        "a path in the manifest",
        "its manifest lists ../../passwd",
        lambda folder: write_manifest(folder, **{"../../passwd": "00"}),
    ),
    ("a manifest of 17 MiB", "larger than", _files("manifest.json", b" " * (17 << 20))),
    (
        "format 9",
        "expected checkpoint format 1, got 9: it was written by another version of ticketworks",
        _state(format=9),
    ),
    ("text for the arithmetic", 'arithmetic: expected a whole number of at least 0, got "1"', _state(arithmetic="1")),
    ("step -1", "state.json: step: expected a whole number of at least 0, got -1", _state(step=-1)),
    ("text for the ranks", 'world_size: expected a whole number of at least 0, got "2"', _state(world_size="2")),
    ("10^18 ranks", "world_size: expected 1 to 1048576, got 1000000000000000000", _state(world_size=10**18)),
    ("no configuration", "config: expected an object, got null", _state(config=None)),
    ("state.json is a FIFO", "not a regular file", _replaced("state.json", os.mkfifo)),
    (
        "weights are a link",
        "a symbolic link",
        _replaced("state.safetensors", lambda path: path.symlink_to(path.parent.parent / path.name)),
    ),
    (
        "weights are a device",
        "a symbolic link",
        _replaced("state.safetensors", lambda path: path.symlink_to("/dev/zero")),
    ),
)


def _checkpoint(change: Callable[[Path], None]) -> Callable[[Good, Path], list[str]]:
    def make(good: Good, folder: Path) -> list[str]:
        copied = folder / "step-00000040"
        shutil.copytree(good.root / "run" / "checkpoints" / "step-00000040", copied)
        change(copied)
        return good.train("--resume", str(copied))

    return make


CASES = [
    *(Case("ticket", name, DATA, says, _ticket(edit)) for name, says, edit in TICKETS),
    Case("ticket", "a link", DATA, "a symbolic link, expected the file itself", _linked),
    Case("ticket", "a FIFO", DATA, "not a regular file", _ticket_fifo),
    Case(
        "ticket",
        "attacks by sparse inference",
        CONFIG,
        "--adversarial: attacks need gradients, which --sparse does not compute; do: leave out one of the two",
        lambda good, _: good.evaluate(good.root / "tickets", "--sparse", "--adversarial"),
    ),
    Case(
        "ticket",
        "a name that is not in the zoo",
        CONFIG,
        "nowhere: is neither a file nor an entry of the zoo",
        lambda *_: [sys.executable, "-m", "pipeline.tickets", "bench", "nowhere"],
    ),
    Case("ticket", "two with one index", INTEGRITY, "different tickets with the same index", _two_with_one_index),
    *(Case("checkpoint", name, INTEGRITY, says, _checkpoint(change)) for name, says, change in CHECKPOINTS),
    Case(
        "checkpoint",
        "no such path",
        CONFIG,
        "nowhere: does not exist",
        lambda good, folder: good.train("--resume", f"{folder}/nowhere"),
    ),
    Case(
        "checkpoint",
        "a file",
        CONFIG,
        "is not a folder",
        lambda good, folder: good.train("--resume", str(good.config)),
    ),
]

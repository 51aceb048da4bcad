"""13 bad inputs: to `python -m launchers.verify`, to `python -m launchers.bundle`, and to `--stop-after`."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from pipeline.chain import canonical, link_of
from tests.campaigns.bad_configurations import SRUN
from tests.campaigns.cases import CONFIG, DATA, INTEGRITY, Case, Good

START = {
    "kind": "start",
    "step": 0,
    "format": 1,
    "config_digest": "00",
    "settings": {},
    "data": {},
    "ranks": 1,
    "environment": {},
}
Make = Callable[[Good, Path], list[str]]


def _verify(target: Path | str, *more: str) -> list[str]:
    return [sys.executable, "-m", "launchers.verify", str(target), "--segments", "0", *more]


def _run(folder: Path, chain: bytes | None) -> list[str]:
    (folder / "run.json").write_text('{"run_id": "small-0"}')
    if chain is not None:
        (folder / "chain.jsonl").write_bytes(chain)
    return _verify(folder)


def _chain(**changes: object) -> Make:
    record = START | changes
    return lambda _, folder: _run(folder, (canonical({**record, "link": link_of("", record)}) + "\n").encode())


def _empty(_: Good, folder: Path) -> list[str]:
    return _verify(folder)


def _twice(_: Good, folder: Path) -> list[str]:
    return _verify(folder)


def _text(_: Good, folder: Path) -> list[str]:
    (folder / "a.tar").write_text("not a tar file" * 100)
    return _verify(folder / "a.tar")


def _fifo(_: Good, folder: Path) -> list[str]:
    os.mkfifo(folder / "a.tar")
    return _verify(folder / "a.tar")


def _outside(_: Good, folder: Path) -> list[str]:
    with tarfile.open(folder / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("../../evil")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"evil"))
    return _verify(folder / "a.tar")


def _manifest(_: Good, folder: Path) -> list[str]:
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {"run.json": "00"}}))
    return _verify(folder)


CASES = [
    Case("verification", "nothing of this name", CONFIG, "is not a folder, a bundle or", lambda *_: _verify("nowhere")),
    Case("verification", "two tasks of srun", CONFIG, "srun has started 2 verifications, expected one", _twice, SRUN),
    Case("verification", "an empty folder", CONFIG, "is not the folder of a run: it has no run.json", _empty),
    Case("verification", "a run without a chain", DATA, "has no chain.jsonl", lambda _, folder: _run(folder, None)),
    Case("verification", "an empty chain", INTEGRITY, "chain.jsonl is empty", lambda _, folder: _run(folder, b"")),
    Case("verification", "a chain that is cut off", INTEGRITY, "line 1 has no end", lambda _, f: _run(f, b'{"kind"')),
    Case("verification", "a chain of another version", INTEGRITY, "expected format 1, got 9", _chain(format=9)),
    Case("verification", "text in place of a bundle", INTEGRITY, "a.tar: is not a bundle", _text),
    Case("verification", "a FIFO in place of a bundle", INTEGRITY, "a.tar: it is not a regular file", _fifo),
    Case("verification", "a bundle that writes elsewhere", INTEGRITY, "does not belong into a bundle", _outside),
    Case("verification", "a bundle without its files", INTEGRITY, "run.json is missing", _manifest),
    Case(
        "verification",
        "a bundle of no run",
        CONFIG,
        "is not the folder of a run",
        lambda _, folder: [sys.executable, "-m", "launchers.bundle", str(folder), "--output", str(folder / "a.tar")],
    ),
    Case(
        "verification",
        "a stop before the first step",
        CONFIG,
        "--stop-after: '0' is not a whole number of at least 1",
        lambda good, _: good.train("--stop-after", "0"),
    ),
]

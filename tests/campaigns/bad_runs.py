"""7 bad folders for `python -m pipeline.tracking open|compare`: not of a run, damaged, on a server without password."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.tracking.journal import Acknowledged
from tests.campaigns.cases import CONFIG, Case, Good

RUN = json.dumps({"run": "pending-0", "name": "a", "experiment": "e", "time": 1.0}) + "\n"


def _look(command: str, *folders: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.tracking", command, "--no-browser", *map(str, folders)]


def _missing(_: Good, folder: Path) -> list[str]:
    return _look("open", folder / "nowhere")


def _second_is_empty(_: Good, folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text(RUN)
    (folder / "empty").mkdir()
    return _look("compare", folder / "run", folder / "empty")


def _fifo(_: Good, folder: Path) -> list[str]:
    os.mkfifo(folder / "metrics.jsonl")
    return _look("open", folder)


def _holding(content: bytes) -> Callable[[Good, Path], list[str]]:
    def make(_: Good, folder: Path) -> list[str]:
        (folder / "metrics.jsonl").write_bytes(content)
        return _look("open", folder)

    return make


def _without_password(_: Good, folder: Path) -> list[str]:
    (folder / "metrics.jsonl").write_text(RUN)
    sent = Acknowledged("postgresql://me:[redacted]@host/mlflow", run="pending-0", run_id="0a", experiment_id="1")
    (folder / "metrics.sent.json").write_text(json.dumps(asdict(sent)))
    return _look("open", folder)


NO_RUN = "metrics.jsonl: does not contain the record that is written when a run starts"
CASES = [
    Case("run", "no such folder", CONFIG, "nowhere: does not exist; do: pass the output_dir of a run", _missing),
    Case("run", "the second is empty", CONFIG, "empty: has no metrics.jsonl", _second_is_empty),
    Case("run", "a FIFO", CONFIG, "metrics.jsonl: is not a regular file", _fifo),
    Case("run", "an empty journal", CONFIG, NO_RUN, _holding(b"")),
    Case("run", "a journal of zeros", CONFIG, NO_RUN, _holding(bytes(5000))),
    Case("run", "a journal that starts late", CONFIG, NO_RUN, _holding(b'{"params": {"a": "1"}}\n')),
    Case(
        "run",
        "a server whose password is not kept",
        CONFIG,
        "cannot connect to postgresql://me:[redacted]@host/mlflow: its password is not stored on disk",
        _without_password,
    ),
]

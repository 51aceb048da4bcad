"""A bad input of the campaign: how it is made, the command that reads it, and the expected end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaigns.materials import SIDE, copy_beton, make_beton, make_checkpoint, make_config, make_ticket
from tests.support.launch import ROOT

CONFIG, DATA, WRITE, INTEGRITY = 64, 65, 73, 78


@dataclass(frozen=True)
class Good:
    """Good inputs in one folder."""

    root: Path

    @property
    def beton(self) -> Path:
        return self.root / "data" / "train.beton"

    @property
    def config(self) -> Path:
        return self.root / "good.yaml"

    @property
    def ticket(self) -> bytes:
        return (self.root / "tickets" / "ticket-000.safetensors").read_bytes()

    def train(self, *more: str) -> list[str]:
        """Return a training command to which only the bad part is added."""
        return [sys.executable, str(ROOT / "launchers" / "train.py"), "--config", str(self.config), *more]

    def evaluate(self, tickets: Path, *more: str, data: Path | None = None) -> list[str]:
        script = str(ROOT / "launchers" / "evaluate.py")
        return [
            sys.executable,
            script,
            "--tickets",
            str(tickets),
            "--data",
            str(data or self.beton),
            "--output",
            f"{tickets}.report",
            *more,
        ]

    @staticmethod
    def prepare(*arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def make_good(root: Path) -> Good:
    """Write everything that the cases are derived from."""
    from PIL import Image

    (root / "data").mkdir(parents=True)
    make_beton(root / "data" / "train.beton")
    copy_beton(root / "data" / "train.beton", root / "data" / "val.beton")
    make_config(root / "good.yaml", root / "data", root / "run")
    (root / "tickets").mkdir()
    (root / "tickets" / "ticket-000.safetensors").write_bytes(make_ticket())
    make_checkpoint(root / "run" / "checkpoints" / "step-00000040")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / "images" / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (SIDE, SIDE), (40 * index, 80, 120)).save(
                    root / "images" / split / name / f"{index}.jpg"
                )
    return Good(root)


@dataclass(frozen=True)
class Case:
    """``make(good, folder)`` writes the input into an empty folder and returns the command line."""

    kind: str
    name: str
    code: int
    expects: str  # the error line must contain this
    make: Callable[[Good, Path], list[str]]
    environ: Mapping[str, str] = field(default_factory=dict)

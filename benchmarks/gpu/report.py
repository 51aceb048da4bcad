"""What the acceptance prints and writes: one line a result, with its bar, and what was wrong or missed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RIGHT, WRONG, MET, MISSED = "right", "WRONG", "met", "missed"


@dataclass(frozen=True)
class Options:
    """How the acceptance runs."""

    device: str  # "cuda" or "cpu"
    is_quick: bool  # small networks and few rounds, only to test that the code runs
    threads: int
    model: str  # of the parts that measure time
    pack: Path | None  # images and labels of the study
    study_seconds: float  # 0: the study is not asked for


@dataclass(frozen=True)
class Line:
    """One result.

    ``verdict`` is ``right`` or ``WRONG`` of what must be equal or happen, ``met`` or ``missed`` of a
    number that has a bar, and empty of what is only reported.
    """

    name: str
    text: str
    must: str = ""
    verdict: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Format as ``name  text  must be ≤ 1.02: met``."""
        must = f"  must be {self.must}" if self.must else ""
        return f"{self.name:30} {self.text}{must}{': ' + self.verdict if self.verdict else ''}"


class NotRunError(Exception):
    """A part cannot run here, which is not a fault: a package or a file is missing."""


class Report:
    """Takes the lines of one part.

    Args:
        send: called with every line, as soon as it is known.
        seconds: time that the part should take.
        is_quick: see :class:`Options`.
    """

    def __init__(self, send: Callable[[Line], None], seconds: float, *, is_quick: bool) -> None:
        self._send = send
        self._since = time.monotonic()
        self.seconds, self.is_quick = seconds, is_quick

    def has_time(self, share: float = 1.0) -> bool:
        """Return whether less than ``share`` of the part's time has passed."""
        return time.monotonic() - self._since < share * self.seconds

    def say(self, name: str, text: str, **numbers: float) -> None:
        """Report something that has no bar."""
        self._send(Line(name, text, numbers=numbers))

    def at_most(self, name: str, value: float, limit: float, text: str = "", **numbers: float) -> None:
        """Report a number that should be at most ``limit``."""
        verdict = MET if value <= limit else MISSED
        self._send(Line(name, text or f"{value:.4g}", f"≤ {limit:g}", verdict, {"value": value, **numbers}))

    def at_least(self, name: str, value: float, limit: float, text: str = "", **numbers: float) -> None:
        """Report a number that should be at least ``limit``."""
        verdict = MET if value >= limit else MISSED
        self._send(Line(name, text or f"{value:.4g}", f"≥ {limit:g}", verdict, {"value": value, **numbers}))

    def check(self, name: str, is_right: bool, text: str, must: str, **numbers: float) -> None:
        """Report what must be so; if it is not, the acceptance ends with an error."""
        assert not any(math.isnan(number) for number in numbers.values()), name
        self._send(Line(name, text, must, RIGHT if is_right else WRONG, numbers))

"""How a bar is measured and printed: the ratio of two legs run in turn in one process, median and quartiles over the rounds."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Leg = Callable[[], object]


@dataclass(frozen=True)
class Bar:
    """One measured ratio. ``low`` and ``high`` are the quartiles over the rounds."""

    name: str
    value: float
    low: float
    high: float
    must: str
    aim: str
    limit: str
    numerator_ms: float
    denominator_ms: float

    def line(self) -> str:
        """``S3 layer 23.6 [22.1–24.8] must 5 aim 20 limit 350``, and the two times."""
        return (
            f"{self.name:12} {self.value:7.3g} [{self.low:.3g}–{self.high:.3g}]  must {self.must} aim {self.aim} limit {self.limit}"
            f"   ({self.numerator_ms:.1f} / {self.denominator_ms:.1f} ms)"
        )


def ratio(name: str, numerator: Leg, denominator: Leg, *, must: str, aim: str, limit: str, rounds: int, prepare: Leg = lambda: None) -> Bar:
    """Time both legs in turn, after one round that is not counted; ``prepare`` runs before each round and is not timed."""
    times: list[tuple[float, float]] = []
    for round_index in range(rounds + 1):
        prepare()
        pair = (_milliseconds(numerator), _milliseconds(denominator))
        if round_index:
            times.append(pair)
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else (ratios[0],) * 3
    medians = (statistics.median(a for a, _ in times), statistics.median(b for _, b in times))
    return Bar(name, statistics.median(ratios), low, high, must, aim, limit, *medians)


def _milliseconds(leg: Leg) -> float:
    started = time.perf_counter()
    leg()
    return 1000 * (time.perf_counter() - started)


def arguments(description: str | None) -> argparse.Namespace:
    """``--rounds`` and ``--json``, for every module."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each pair (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the bars to FILE too")
    return parser.parse_args()


def report(bars: Sequence[Bar], path: Path | None) -> None:
    """Print the bars, and write them as JSON."""
    for bar in bars:
        print(bar.line())
    if path is not None:
        path.write_text(json.dumps({bar.name: asdict(bar) for bar in bars}, indent=1) + "\n")

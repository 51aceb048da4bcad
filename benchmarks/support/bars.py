"""How benchmarks measure and print.

Two legs run alternately in one process; results are medians and quartiles over rounds, and medians
over runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from pipeline.command_line import local_path

Leg = Callable[[], object]
Rounds = list[tuple[float, float]]  # (numerator, denominator) in ms, one pair per round


@dataclass(frozen=True)
class Bounds:
    """The bar that a ratio must meet, what it aims at, and the limit that bytes or arithmetic set."""

    must: str
    aim: str = ""
    limit: str = ""

    def __str__(self) -> str:
        """Format as ``must be ≥ 5, aim 20, limit 350``."""
        more = (f", {name} {value}" for name, value in (("aim", self.aim), ("limit", self.limit)) if value)
        return f"must be {self.must}{''.join(more)}"


@dataclass(frozen=True)
class Bar:
    """A ratio of two legs: the median of the runs' medians, and the quartiles over all rounds."""

    name: str
    value: float
    low: float
    high: float
    bounds: Bounds | None
    numerator_ms: float
    denominator_ms: float
    runs: tuple[float, ...]  # the median of each

    def line(self) -> str:
        """Format as ``S3 layer 23.6 [22.1–24.8] must be ≥ 5, …``, the two times, and the runs."""
        runs = f"; runs {', '.join(f'{run:.4g}' for run in self.runs)}" if len(self.runs) > 1 else ""
        return (
            f"{self.name:24} {self.value:6.4g} [{self.low:.4g}–{self.high:.4g}] {self.bounds or ''}"
            f"  ({self.numerator_ms:.1f} / {self.denominator_ms:.1f} ms{runs})"
        )

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Figure:
    """A line of text, and the numbers in it."""

    name: str
    text: str
    numbers: Mapping[str, float]

    def line(self) -> str:
        return f"{self.name:24} {self.text}"

    def as_json(self) -> dict[str, object]:
        return dict(self.numbers)


@dataclass
class Results:
    """Prints every result as soon as it is known, and writes all results at the end."""

    results: dict[str, Bar | Figure] = field(default_factory=dict)

    def add(self, result: Bar | Figure) -> None:
        assert result.name not in self.results, result.name
        self.results[result.name] = result
        print(result.line(), flush=True)

    def write(self, path: Path | None) -> None:
        if path is not None:
            content = {name: result.as_json() for name, result in self.results.items()}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def milliseconds(leg: Leg) -> float:
    """Return the wall time of one call, including its work on a GPU."""
    _finish_work()
    started = time.perf_counter()
    leg()
    _finish_work()
    return 1000 * (time.perf_counter() - started)


def median_ms(leg: Leg, *, rounds: int, prepare: Leg = lambda: None) -> float:
    """Return the median wall time over ``rounds``, after one round that is not counted.

    ``prepare`` runs before each round and is not timed.
    """
    times = []
    for _ in range(rounds + 1):
        prepare()
        times.append(milliseconds(leg))
    return statistics.median(times[1:])


def in_turn(numerator: Leg, denominator: Leg, *, rounds: int, prepare: Leg = lambda: None) -> Rounds:
    """Time both legs alternately, after one round that is not counted.

    ``prepare`` runs before each round and is not timed. The leg that goes first changes from round
    to round, so that neither always finds what the other left in the caches.
    """
    run: Rounds = []
    for index in range(rounds + 1):
        prepare()
        if index % 2:
            second = milliseconds(denominator)
            run.append((milliseconds(numerator), second))
        else:
            run.append((milliseconds(numerator), milliseconds(denominator)))
    return run[1:]


def bar(name: str, runs: Sequence[Rounds], bounds: Bounds | None = None) -> Bar:
    """Summarise the ratio of the two legs over ``runs``."""
    ratios = [[a / b for a, b in run] for run in runs]
    everything = [value for run in ratios for value in run]
    low, _, high = statistics.quantiles(everything, n=4) if len(everything) > 1 else everything * 3
    medians = tuple(statistics.median(run) for run in ratios)
    numerator_ms, denominator_ms = (statistics.median(pair[leg] for run in runs for pair in run) for leg in (0, 1))
    return Bar(name, statistics.median(medians), low, high, bounds, numerator_ms, denominator_ms, medians)


@dataclass(frozen=True)
class Options:
    """The command-line options that benchmarks share."""

    only: tuple[str, ...]
    models: tuple[str, ...]
    runs: int
    rounds: int
    threads: int
    device: str
    is_quick: bool
    json: Path | None
    images: int


def options(
    description: str | None, parts: Sequence[str], *, models: Sequence[str], quick_model: str, images: int = 0
) -> Options:
    """Parse the command line, and set the number of threads.

    Args:
        description: text of ``--help``.
        parts: the choices of ``--only``.
        models: the default of ``--models``.
        quick_model: the default of ``--models`` with ``--quick``.
        images: the default of ``--images``; 0: there is no such option.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument(
        "--only",
        nargs="+",
        choices=parts,
        default=parts,
        metavar="PART",
        help=f"measure only these parts: {', '.join(parts)} (default: all)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"names of the networks to measure (default: {', '.join(models) or 'none'})",
    )
    parser.add_argument("--runs", type=int, metavar="N", help="number of runs, whose median is printed (default: 3)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds per run (default: 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="number of torch threads (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure a small network in one run of one round, only to test that the benchmark works",
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the results to FILE")
    if images:
        parser.add_argument(
            "--images", type=int, default=images, metavar="N", help=f"images per step (default: {images})"
        )
    given = parser.parse_args()
    runs, rounds = (1, 1) if given.quick else (3, 7)
    torch.set_num_threads(given.threads)
    return Options(
        only=tuple(given.only),
        models=tuple(given.models or ([quick_model] if given.quick else models)),
        runs=given.runs or runs,
        rounds=given.rounds or rounds,
        threads=given.threads,
        device=given.device,
        is_quick=given.quick,
        json=given.json,
        images=given.images if images else 0,
    )


def _finish_work() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

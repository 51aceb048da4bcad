"""Compare sparse inference of one ticket with the dense engines that are installed, on this machine."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.inference.dense_engines import (
    INSTALL,
    DenseEngine,
    Engine,
    Images,
    dense_engines,
    has_compiler,
    missing,
)
from pipeline.inference.load import TicketNetwork
from pipeline.inference.network import SparseNetwork
from pipeline.inference.timing import Latency, in_turns
from pipeline.tickets import Ticket

logger = logging.getLogger(__name__)
OURS = "sparse inference"


@dataclass(frozen=True)
class Row:
    """What was measured of one engine."""

    engine: str
    precision: str
    latency: Latency  # milliseconds of a batch
    start_seconds: float  # until the engine has run once
    difference: float  # largest difference from torch's logits, over their largest absolute value


def bench(
    ticket: Ticket, *, threads: int, batch: int, rounds: int, with_compile: bool
) -> tuple[list[Row], dict[str, str]]:
    """Time all engines in turn, by the clock.

    Args:
        ticket: runs with its active weights only by sparse inference, and as a dense network by all others.
        threads: of each engine; torch's are set.
        batch: images of a call.
        rounds: that are counted.
        with_compile: also torch.compile, which compiles for minutes.

    Returns:
        A row for each engine, the fastest first; and why others are left out, by name.

    Raises:
        ConfigError, DataError: as :class:`SparseNetwork` does.
    """
    torch.set_num_threads(threads)
    network = SparseNetwork(ticket, threads=threads)
    model = TicketNetwork(ticket).network
    shape = (batch, *network.image_shape)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        engines = dense_engines(model, shape, Path(folder), threads=threads, with_compile=with_compile)
        tried = [DenseEngine(OURS, "fp32", lambda: network), *engines]
        left_out = _not_there(with_compile=with_compile)
        opened = list(_opened(tried, images, left_out))
    legs = {str(number): lambda run=run: run(images) for number, (_, run, _) in enumerate(opened)}
    times = list(in_turns(legs, rounds).values())
    expected = next(run for engine, run, _ in opened if engine.name == "torch")(images)
    rows = [
        Row(engine.name, engine.precision, Latency.of(of_engine), seconds, _difference(run(images), expected))
        for (engine, run, seconds), of_engine in zip(opened, times, strict=True)
    ]
    return sorted(rows, key=lambda row: row.latency.p50), left_out


def cells(rows: list[Row]) -> list[list[str]]:
    """Return headings and rows of a table."""
    ours = next(row for row in rows if row.engine == OURS)
    return [["engine", "precision", "ms", "p99", "× sparse", "start, s", "differs by"]] + [
        [
            row.engine,
            row.precision,
            f"{row.latency.p50:.3f}",
            f"{row.latency.p99:.3f}",
            f"{row.latency.p50 / ours.latency.p50:.2f}",
            f"{row.start_seconds:.1f}",
            f"{row.difference:.1e}",
        ]
        for row in rows
    ]


def notes(rows: list[Row], left_out: Mapping[str, str]) -> list[str]:
    """Return lines that explain the table, and say what is not in it and what is fastest."""
    return [
        "ms: the median of one call, by the clock; start: until the first output; differs by: the largest difference",
        "from torch's logits, over the largest of them. int8 is calibrated with random images, for its speed only.",
        *(f"left out: {name}: {reason}" for name, reason in left_out.items()),
        "",
        *verdict(rows),
    ]


def verdict(rows: list[Row]) -> list[str]:
    """Say which engine is fastest, in fp32 and of all."""
    ours = next(row for row in rows if row.engine == OURS)
    lines = []
    for others, what in (
        ([row for row in rows if row is not ours and row.precision == "fp32"], "in fp32"),
        ([row for row in rows if row is not ours and row.precision != "fp32"], "in other precisions"),
    ):
        if others:
            best = min(others, key=lambda row: row.latency.p50)
            ratio = best.latency.p50 / ours.latency.p50
            name = f"{best.engine} {best.precision}"
            lines.append(
                f"{what}: {OURS} is {ratio:.2f} times as fast as {name}, the fastest dense engine"
                if ratio >= 1
                else f"{what}: {name} is {1 / ratio:.2f} times as fast as {OURS}"
            )
    return lines


def _not_there(*, with_compile: bool) -> dict[str, str]:
    found = dict.fromkeys(missing(), f"not installed; do: {INSTALL}")
    return found if has_compiler() or not with_compile else found | {"torch.compile": "there is no C++ compiler"}


def _opened(
    engines: list[DenseEngine], images: Images, left_out: dict[str, str]
) -> Iterator[tuple[DenseEngine, Engine, float]]:
    for engine in engines:
        logger.info("preparing %s %s", engine.name, engine.precision)
        started = time.perf_counter()
        try:
            run = engine.open()
            run(images)
        except Exception as error:  # of a library of others, which may raise anything for a network it cannot run
            if engine.name in (OURS, "torch"):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            left_out[f"{engine.name} {engine.precision}"] = reason
        else:
            yield engine, run, time.perf_counter() - started


def _difference(found: Images, expected: Images) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())

"""Time functions in turn, so that a change of the machine's load meets all of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.distributed.machine import processor
from pipeline.limits import usable_cpus

Leg = Callable[[], Any]
INSTRUCTIONS = ("asimd", "avx2", "avx512f", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, over many: the median, and what 99 of 100 calls stay below."""

    p50: float
    p99: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> Latency:
        """Return the percentiles of some times."""
        p50, p99 = np.percentile(milliseconds, (50, 99)).tolist()
        return Latency(p50, p99)


def describe_processor() -> str:
    """Name this processor and those of its instructions that decide how fast engines are."""
    known = processor()
    flags = [flag for flag in INSTRUCTIONS if flag in known["cpu_flags"].split()]
    return " ".join(filter(None, (known["cpu"], f"({', '.join(flags)})" if flags else "", known["isa_limits"])))


def describe_load() -> str:
    """Say how busy the machine is, and whether too busy to time anything by the clock."""
    load, cpus = os.getloadavg()[0], usable_cpus()
    return f"load {load:.1f} on {cpus} CPUs" + (
        ": it is busy, and times by the clock are too long" if load > cpus else ""
    )


def wall_ms(leg: Leg) -> float:
    """Return the milliseconds that one call takes by the clock."""
    started = time.perf_counter()
    leg()
    return 1000 * (time.perf_counter() - started)


def thread_ms(leg: Leg) -> float:
    """Return the milliseconds of processor time, of this thread alone, that one call takes.

    For work of one thread that is what the clock would say on a machine that does nothing else.
    """
    started = time.thread_time()
    leg()
    return 1000 * (time.thread_time() - started)


def cpu_ms(leg: Leg) -> float:
    """Return the milliseconds of processor time, of all threads of this process, that one call takes."""
    started = time.process_time()
    leg()
    return 1000 * (time.process_time() - started)


def in_turns(
    legs: Mapping[str, Leg],
    rounds: int,
    clock: Callable[[Leg], float] = wall_ms,
    *,
    max_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Call functions in turn, and time them.

    There is one more round, the first, that is not counted. Another function begins in every round, so that none
    always finds what the same other one left in the caches.

    Args:
        legs: by name.
        rounds: that are counted.
        clock: times one call.
        max_seconds: after which no further round begins, if there was one.

    Returns:
        The milliseconds of every round, by name.
    """
    found: dict[str, list[float]] = {name: [] for name in legs}
    names = list(legs)
    end = time.monotonic() + max_seconds
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            milliseconds = clock(legs[name])
            if number:
                found[name].append(milliseconds)
    return found

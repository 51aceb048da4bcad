"""Show progress with rate and remaining time: a bar on a terminal, otherwise one log line every 30 seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.terminal.live import line

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0


@contextmanager
def show_progress(what: str, unit: str, *, says_end: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function ``report(done, total)``, to be called as often as convenient.

    Args:
        what: what is done, such as ``writing train.beton``.
        unit: what is counted, such as ``images``.
        says_end: whether a log that is no terminal also gets a line at the end.
    """
    started = time.monotonic()
    if not line.is_open:
        yield _log_lines(what, unit, started, says_end=says_end)
        return

    def report(done: int, total: int) -> None:
        seconds = time.monotonic() - started
        line.show(lambda columns: bar(what, unit, done, total, seconds, columns, is_unicode=line.is_unicode))

    with line.showing(lambda _: what):
        yield report


def counted(parts: Iterable[T], what: str, unit: str, total: int) -> Iterator[T]:
    """Yield ``parts`` and show as progress how many of ``total`` are done."""
    with show_progress(what, unit, says_end=False) as report:
        for done, part in enumerate(parts):
            report(done, total)
            yield part


def bar(what: str, unit: str, done: int, total: int, seconds: float, columns: int, *, is_unicode: bool = True) -> str:
    """Return what is done as a line with a bar, as wide as ``columns``."""
    from tqdm import tqdm

    return str(
        tqdm.format_meter(
            done,
            total,
            seconds,
            ncols=columns - 1,
            prefix=what,
            ascii=not is_unicode,
            unit=f" {unit}",
            unit_scale=False,
        )
    )


def duration(seconds: float) -> str:
    """Format a duration for people: ``0:07``, ``12:07``, ``3:12:07``, ``2d 03:12``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _log_lines(what: str, unit: str, started: float, *, says_end: bool) -> Callable[[int, int], None]:
    last = started

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if (says_end and done == total) or now - last >= LOG_INTERVAL_SECONDS:
            last = now
            logger.info("%s: %d of %d %s%s", what, done, total, unit, _pace(done, total, now - started))

    return report


def _pace(done: int, total: int, seconds: float) -> str:
    """Format rate and remaining time, for example ``, 431/s, 12:07 left``."""
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    left = f", {duration((total - done) / rate)} left" if done < total else ""
    return f", {rate:.{0 if rate >= 10 else 1}f}/s{left}"

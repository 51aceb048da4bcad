"""Show progress with rate and remaining time: a bar on a terminal, otherwise one log line every 30 seconds."""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0


@contextmanager
def show_progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function ``report(done, total)``, to be called as often as convenient."""
    if not sys.stderr.isatty():
        yield _log_lines(what, unit)
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit=f" {unit}") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _log_lines(what: str, unit: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LOG_INTERVAL_SECONDS:
            last = now
            logger.info("%s: %d of %d %s%s", what, done, total, unit, _pace(done, total, now - started))

    return report


def _pace(done: int, total: int, seconds: float) -> str:
    """Format rate and remaining time, for example ``, 431/s, 0:12:07 left``."""
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    left = f", {datetime.timedelta(seconds=round((total - done) / rate))} left" if done < total else ""
    return f", {rate:.{0 if rate >= 10 else 1}f}/s{left}"

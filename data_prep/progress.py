"""Progress for people and for logs: a bar on a terminal, otherwise one log line every half minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

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
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LOG_INTERVAL_SECONDS:
            last = time.monotonic()
            log.info("%s: %d of %d %s", what, done, total, unit)

    return report

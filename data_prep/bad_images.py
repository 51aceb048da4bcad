"""Files that are no usable images: listed, counted, and an error when there are more of them than may be skipped."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.errors import DataError

log = logging.getLogger(__name__)

NUM_LISTED = 100


def report_bad(bad: Sequence[str], skip_bad: int) -> None:
    """``bad`` are lines ``file: why``. Raises DataError when there are more than ``skip_bad``."""
    for line in bad[:NUM_LISTED]:
        log.warning("not usable: %s", line)
    if len(bad) > NUM_LISTED:
        log.warning("… and %d more", len(bad) - NUM_LISTED)
    if len(bad) > skip_bad:
        raise DataError(
            f"files that are not usable images: {len(bad)}, where {skip_bad} may be skipped; the first is {bad[0]}",
            do=f"repair or remove them, or leave them out with --skip-bad {len(bad)}",
        )

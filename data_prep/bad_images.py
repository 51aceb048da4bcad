"""Report files that are not usable images: list them, and fail when there are more than may be skipped."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.errors import DataError

logger = logging.getLogger(__name__)

NUM_LISTED = 100


def report_bad(bad: Sequence[str], skip_bad: int) -> None:
    """Log the files that are not usable images, the first 100 of them by name.

    Args:
        bad: lines ``file: why``.
        skip_bad: how many files may be left out.

    Raises:
        DataError: there are more than ``skip_bad``.
    """
    for line in bad[:NUM_LISTED]:
        logger.warning("unusable image: %s", line)
    if len(bad) > NUM_LISTED:
        logger.warning("… and %d more", len(bad) - NUM_LISTED)
    if len(bad) > skip_bad:
        found = "found 1 unusable image" if len(bad) == 1 else f"found {len(bad)} unusable images"
        raise DataError(
            f"{found}, but --skip-bad allows {skip_bad}; the first: {bad[0]}",
            do=f"repair, move or remove what is unusable, or leave it out with --skip-bad {len(bad)}",
        )

"""Attributes the time of an update to the lines of the project that call its parts."""

from __future__ import annotations

import linecache
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pipeline.sparse import sparsifier, update

_SPARSIFIER, _UPDATE = sparsifier.__file__, update.__file__
# Other functions count for the line that calls them.
_STEPS_OF_UPDATE = ("updated_masks", "prune_and_regrow", "prune_to", "grow_to")


class Breakdown:
    """A context manager that charges every moment to the innermost of these lines being executed.

    A line's time includes everything that it calls. Operations on a GPU continue after the call that
    starts them, so that on a GPU this is the time of the host.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = defaultdict(float)
        self._line: tuple[str, int] | None = None
        self._since = 0.0

    def __enter__(self) -> Breakdown:
        sys.setprofile(self._event)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.setprofile(None)
        self._line = None

    def milliseconds(self) -> dict[str, float]:
        """Return the time of each line, such as ``update.py:57  the line``, the largest first."""
        ordered = sorted(self._seconds.items(), key=lambda item: -item[1])
        return {
            f"{Path(file).name}:{number}  {linecache.getline(file, number).strip()}": 1000 * seconds
            for (file, number), seconds in ordered
        }

    def _event(self, frame: FrameType, event: str, _argument: Any) -> None:
        if self._line is not None:
            self._seconds[self._line] += time.perf_counter() - self._since
        self._line = _line_of_story(frame.f_back if event == "return" else frame)
        self._since = time.perf_counter()


def _line_of_story(frame: FrameType | None) -> tuple[str, int] | None:
    while frame is not None:
        code = frame.f_code
        is_step = code.co_filename == _UPDATE and code.co_qualname.split(".")[0] in _STEPS_OF_UPDATE
        if is_step or code.co_filename == _SPARSIFIER:
            return code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None

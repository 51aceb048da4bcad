"""Profile a window of steps with ``torch.profiler``: ``train.profile``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed import session

logger = logging.getLogger(__name__)


class ProfileWindow:
    """Records the steps from ``first`` to ``stop`` − 1 of the run on rank 0, and writes a trace into the run's folder.

    A run that is resumed within the window, or ends there, writes none.

    Args:
        window: ``first`` and ``stop``; empty: nothing is recorded.
        folder: the run's folder.
        step: the next step of the run.
    """

    def __init__(self, window: Sequence[int], folder: Path, *, step: int) -> None:
        self._first, self._stop = window if window and session.is_main() else (-1, -1)
        self._folder = folder
        self._profile: profile | None = None
        self.before(step)

    def before(self, step: int) -> None:
        """Begin or end the record, if step ``step`` is the first one or the one after the last."""
        if step == self._first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without lines for the profiler's developers
            on_gpu = [ProfilerActivity.CUDA] if session.device().type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()
        elif step == self._stop and self._profile is not None:
            self._write(self._profile)
            self._profile = None

    def _write(self, seen: profile) -> None:
        if session.device().type == "cuda":
            torch.cuda.synchronize()  # the kernels of the last step belong to it
        seen.stop()
        path = self._folder / f"profile-{self._first}-{self._stop}.json.gz"
        unfinished = path.with_name(f".{path.name}")
        try:
            seen.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            logger.warning("profile: %s cannot be written: %s", path, error)
            return
        logger.info("profile: steps %d to %d are in %s; open it in ui.perfetto.dev", self._first, self._stop - 1, path)

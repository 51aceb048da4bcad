"""Track the params, metrics and artifacts of a run: as JSON lines on disk, and in MLflow. See docs/tracking.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config.schema import TrackingConfig
from pipeline.tracking.place import check_place, where
from pipeline.tracking.tracker import PARENT_RUN, PARENT_TAG, JsonLinesTracker, NullTracker, Tracker

__all__ = ["PARENT_RUN", "Tracker", "open_tracker"]


# backend -> its class, of (output_dir, experiment, run_name, resume_run_id); None: opened below
TRACKERS: dict[str, Callable[..., Tracker] | None] = {"mlflow": None, "jsonl": JsonLinesTracker, "none": None}


def open_tracker(config: TrackingConfig, *, output_dir: Path, run_name: str, resume_run_id: str = "") -> Tracker:
    """Open the tracker that ``config.backend`` names on the main rank, and one that does nothing on the others.

    The run is a child of the run that the environment variable ``PARENT_RUN`` names, if it is set.
    Call it inside the session. A server that does not respond delays the start by a few seconds at most.

    Args:
        config: the section ``tracking`` of the configuration.
        output_dir: the run's folder.
        run_name: name of the run in MLflow.
        resume_run_id: :attr:`Tracker.run_id` of an earlier process, whose run is continued.

    Raises:
        ConfigError: scheme, driver or path of the store cannot be used.
        ServiceError: ``config.required`` is set and the server does not respond.
    """
    if config.backend == "none" or not _is_main():
        return NullTracker()
    tracker = _open(config, output_dir=output_dir, run_name=run_name, resume_run_id=resume_run_id)
    if parent := os.environ.get(PARENT_RUN):
        tracker.set_tags({PARENT_TAG: parent})
    return tracker


def _is_main() -> bool:
    """Return whether this process reports; one without torch is in no session, and importing torch takes seconds."""
    if "torch" not in sys.modules:
        return True
    from pipeline.distributed import session

    return session.is_main()


def _open(config: TrackingConfig, *, output_dir: Path, run_name: str, resume_run_id: str) -> Tracker:
    place = where(output_dir, config)
    if (own := TRACKERS[config.backend]) is not None:
        return own(output_dir, experiment=place.experiment, run_name=run_name, resume_run_id=resume_run_id)
    check_place(place)
    from pipeline.tracking.spooled import SpooledTracker

    return SpooledTracker(
        output_dir, place=place, run_name=run_name, resume_run_id=resume_run_id, is_required=config.required
    )

"""Params, metrics and artifacts of a run: JSON lines on disk always, MLflow beside them. See docs/tracking.md."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import TrackingConfig
from pipeline.tracking.tracker import JsonLinesTracker, NullTracker, Tracker

__all__ = ["Tracker", "open_tracker"]


def open_tracker(config: TrackingConfig, *, output_dir: Path, run_name: str, resume_run_id: str = "") -> Tracker:
    """The tracker that ``config.backend`` names, on the main rank; a silent one on the others.

    Call it inside the session.

    ``resume_run_id`` is the :attr:`Tracker.run_id` of an earlier process: its run is continued. A
    server that does not answer delays the start by some seconds at most; with ``config.required``
    it is a :class:`~pipeline.errors.ServiceError`.
    """
    from pipeline.distributed import session  # torch: not at the top

    if not session.is_main() or config.backend == "none":
        return NullTracker()
    if config.backend == "jsonl":
        return JsonLinesTracker(
            output_dir, experiment=config.experiment, run_name=run_name, resume_run_id=resume_run_id
        )
    from pipeline.tracking.spooled import SpooledTracker

    return SpooledTracker(
        output_dir,
        uri=config.uri,
        experiment=config.experiment,
        run_name=run_name,
        resume_run_id=resume_run_id,
        is_required=config.required,
    )

"""Params, metrics and artifacts of a run: JSON lines on disk always, MLflow beside them. See docs/tracking.md."""

from pipeline.tracking.tracker import Tracker, open_tracker

__all__ = ["Tracker", "open_tracker"]

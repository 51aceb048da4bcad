"""The Tracker protocol, through which a run reports about itself, and the trackers that need no server."""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from pipeline.errors import Preempted, RunError
from pipeline.redaction import REDACTED, SECRET_KEY, redact
from pipeline.tracking.journal import Journal

logger = logging.getLogger(__name__)

# environment variable with the :attr:`Tracker.run_id` of a run whose child this run is, as of a sweep
PARENT_RUN = "TICKETWORKS_PARENT_RUN"
PARENT_TAG = "mlflow.parentRunId"  # under which MLflow shows a run as the child of another
PENDING = "pending-"  # prefix of run ids that the tracker chose itself, before or without a server

_METRIC_KEY = re.compile(r"[a-z]+/[\w./-]+")  # the part before the slash is the chart section
_CHILD_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class Tracker(Protocol):
    """Params, metrics and artifacts of one run.

    Used with ``with``: an exception closes the run as failed, or as preempted.

    Attributes:
        last_step: the step that was reported last, or that the run resumed from; None before the first.
    """

    last_step: int | None

    @property
    def run_id(self) -> str:
        """Id to pass to :func:`open_tracker` to continue this run; empty when it cannot be continued."""
        ...

    def log_params(self, params: Mapping[str, object]) -> None:
        """Report settings.

        Nested mappings become dotted keys, a key that was reported before keeps its value, and
        secrets are redacted.
        """

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Report numbers at an optimiser step, without waiting for a server.

        Keys are ``section/name``, with the sections train, val, eval, mask, time and system.
        """

    def log_layers(self, density: Mapping[str, float], r_s: Mapping[str, float], *, step: int) -> None:
        """Report density and R_s of each layer after an optimiser step; for the run's figures, not for MLflow."""

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        """Report a result as a child run of this one, such as ``ticket-0`` or ``superposition-mean``.

        Reporting the same name again updates it.
        """

    def log_input(
        self, name: str, *, digest: str, context: str, source: str, profile: Mapping[str, str | int | float]
    ) -> None:
        """Report a data set that the run reads.

        Args:
            name: what the data set is called.
            digest: sha256 of its content, in hexadecimal.
            context: what it is used for, such as ``training``.
            source: its path.
            profile: further facts, such as ``num_samples``.
        """

    def log_artifact(self, path: Path) -> None:
        """Report a small file, or a folder with small files; tickets and checkpoints are not uploaded."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags; secrets are redacted."""

    def resume_from(self, step: int) -> None:
        """Report that training continues after ``step``, so that steps done again are not shown twice."""

    def flush(self) -> None:
        """Put everything on disk and, if the server responds within seconds, on the server."""

    def close(self, status: str = "FINISHED") -> None:
        """End the run as ``FINISHED`` or ``FAILED``, or leave it ``RUNNING`` with the tag ``preempted``.

        A second call does nothing.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close("RUNNING" if isinstance(error, Preempted) else "FAILED")
        except RunError as second:
            logger.warning("the tracker could not be closed: %s", second)  # the first error is the one to report


class NullTracker(Tracker):
    """A tracker that does nothing: for all ranks but the first, and for ``backend: none``."""

    run_id = ""
    last_step = None

    def log_params(self, params: Mapping[str, object]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        pass

    def log_layers(self, density: Mapping[str, float], r_s: Mapping[str, float], *, step: int) -> None:
        pass

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        pass

    def log_input(
        self, name: str, *, digest: str, context: str, source: str, profile: Mapping[str, str | int | float]
    ) -> None:
        pass

    def log_artifact(self, path: Path) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def resume_from(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, status: str = "FINISHED") -> None:
        pass


class JsonLinesTracker(Tracker):
    """Writes ``metrics.jsonl`` in the run's folder, one JSON object per call."""

    def __init__(self, output_dir: Path, *, experiment: str, run_name: str, resume_run_id: str = "") -> None:
        self._output_dir = output_dir.resolve()
        self.last_step: int | None = None
        self._key = resume_run_id or PENDING + uuid.uuid4().hex
        self._journal = Journal(self._output_dir)
        self._append({"run": self._key, "name": run_name, "experiment": experiment})

    @property
    def run_id(self) -> str:
        return self._key

    def _append(self, record: Mapping[str, object]) -> None:
        self._journal.append({**record, "time": round(time.time(), 3)})

    def log_params(self, params: Mapping[str, object]) -> None:
        self._append({"params": flatten_params(params)})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.last_step = int(step)
        self._append({"step": int(step), "metrics": _numbers(metrics)})

    def log_layers(self, density: Mapping[str, float], r_s: Mapping[str, float], *, step: int) -> None:
        layers = {name: [round(density[name], 5), round(r_s[name], 5)] for name in density}
        self._append({"layers": layers, "after_step": int(step)})

    def log_child(self, name: str, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
        assert _CHILD_NAME.fullmatch(name), name
        self._append({"child": name, "params": flatten_params(params), "metrics": _numbers(metrics)})

    def log_input(
        self, name: str, *, digest: str, context: str, source: str, profile: Mapping[str, str | int | float]
    ) -> None:
        record = {"input": name, "digest": digest, "context": context, "source": redact(source)}
        self._append(record | {"profile": dict(profile)})

    def log_artifact(self, path: Path) -> None:
        path = path.resolve()
        inside = path.is_relative_to(self._output_dir)  # a relative path survives a move of the run's folder
        self._append({"artifact": str(path.relative_to(self._output_dir) if inside else path)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append({"tags": flatten_params(tags)})

    def resume_from(self, step: int) -> None:
        self.last_step = int(step)
        self._append({"resumed_from_step": int(step)})

    def flush(self) -> None:
        self._journal.sync()

    def close(self, status: str = "FINISHED") -> None:
        assert status in ("FINISHED", "FAILED", "RUNNING"), status
        if self._journal.is_closed:
            return
        try:
            if status == "RUNNING":
                self.set_tags({"preempted": "true"})
            else:
                self._append({"status": status})
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        self._journal.close()


def flatten_params(params: Mapping[str, object], *, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings into dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``.

    Values whose key names a secret, and passwords in URIs, are redacted.
    """
    flat: dict[str, str] = {}
    for name, value in params.items():
        key = prefix + re.sub(r"[^\w./ :-]", "_", str(name))
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if SECRET_KEY.search(key):
            flat[key] = REDACTED
        elif isinstance(value, Mapping):
            flat |= flatten_params(value, prefix=f"{key}.")
        else:
            flat[key] = redact(str(value))
    return flat


def _numbers(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Convert to plain floats, or to "nan", "inf" and "-inf" where JSON has no number; ``float`` reads these back."""
    numbers: dict[str, float | str] = {}
    for key, metric in metrics.items():
        assert _METRIC_KEY.fullmatch(key), f"{key!r} has no chart section"
        value = float(metric)
        numbers[key] = value if math.isfinite(value) else str(value)
    return numbers

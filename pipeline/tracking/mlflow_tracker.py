"""MLflow, fed from the journal. The only module that imports mlflow.

Training appends to ``metrics.jsonl`` and goes on; one background thread brings the server up to date and saves how far the server has
acknowledged. After an outage or a kill it goes on from there. A batch that may have arrived without an answer is sent again, which does
no harm: MLflow drops a point whose run, key, step, time and value it has, and a run is looked up by its tag before it is created.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ServiceError
from pipeline.tracking.journal import FILE_NAME, Acknowledged, Journal, count_records, read_batch
from pipeline.tracking.tracker import PENDING, REDACTED, JsonLinesTracker, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

KEY_TAG = "ticketworks.key"  # names a run before the server has given it an id
MAX_METRICS, MAX_PARAMS = 1000, 100  # MLflow's limits for one batch
SEND_EVERY_SECONDS = 5.0
RETRY_SECONDS = (5.0, 60.0)  # doubled from one failure to the next
START_SECONDS = 5.0
REQUIRED_START_SECONDS = 30.0
FLUSH_SECONDS = 12.0
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread below retries; a retry inside a request could create a run twice
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class MlflowTracker(JsonLinesTracker):
    """A journal, and a thread that keeps an MLflow server up to date with it."""

    def __init__(
        self, output_dir: Path, *, uri: str, experiment: str, run_name: str, resume_run_id: str = "", is_required: bool = False
    ) -> None:
        output_dir = output_dir.resolve()
        acknowledged = Acknowledged.load(output_dir)
        if acknowledged and acknowledged.run_id and acknowledged.run_id == resume_run_id:
            resume_run_id = acknowledged.run  # the same name in the whole journal, so that it can be replayed to another server
        super().__init__(output_dir, experiment=experiment, run_name=run_name, resume_run_id=resume_run_id)
        self._changed = threading.Condition()
        self._is_woken = self._is_stopping = False
        self._num_failures = 0
        self._error = ""
        try:
            self._uploader = Uploader(output_dir, uri)
            self._thread = threading.Thread(target=self._send_until_stopped, name="mlflow", daemon=True)
            self._thread.start()
            self._wait_for_run(is_required=is_required)
        except BaseException:
            self._is_stopping = True
            self._journal.close()
            raise

    @property
    def run_id(self) -> str:
        sent = self._uploader.sent
        return sent.run_id if sent.run == self._key else self._key

    def flush(self) -> None:
        super().flush()
        self._wait(self._journal.num_bytes, FLUSH_SECONDS)

    def _wait_for_run(self, *, is_required: bool) -> None:
        sent = self._uploader.sent
        self._wait(self._journal.num_bytes, REQUIRED_START_SECONDS if is_required else START_SECONDS)
        if sent.num_bytes and not self._error:
            logger.info("MLflow: run %s in %s", self.run_id, self._uploader.shown_uri)
        elif is_required:
            raise ServiceError(
                f"MLflow at {self._uploader.shown_uri} does not answer: {self._error or f'nothing in {REQUIRED_START_SECONDS:.0f} s'}",
                do="start the server, correct tracking.uri, or set tracking.required=false",
            )

    def _wait(self, num_bytes: int, seconds: float) -> None:
        """Until the server has the journal up to ``num_bytes``, or an attempt has failed, or time is up."""
        with self._changed:
            failures = self._num_failures
            self._is_woken = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._uploader.sent.num_bytes >= num_bytes or self._num_failures > failures, seconds)

    def _release(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        self._uploader.is_abandoned = True  # a thread that still waits for an answer writes nothing any more
        if num_unsent := count_records(self._journal.path, self._uploader.sent.num_bytes):
            logger.warning(
                "%d records have not reached MLflow at %s; they are kept in %s; do: python -m pipeline.tracking replay %s",
                num_unsent,
                self._uploader.shown_uri,
                self._journal.path,
                self._output_dir,
            )
        super()._release()

    def _send_until_stopped(self) -> None:
        """The thread: everything there is, then a pause. One warning per outage."""
        delay = RETRY_SECONDS[0]
        while not self._is_stopping:
            error = self._send_all()
            if error and not self._error:
                logger.warning(
                    "MLflow at %s does not answer; training goes on and %s is sent later: %s",
                    self._uploader.shown_uri,
                    self._journal.path,
                    error,
                )
            elif self._error and not error:
                logger.info("MLflow at %s answers again and has everything", self._uploader.shown_uri)
            with self._changed:
                self._error = error
                self._num_failures += bool(error)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_woken or self._is_stopping, delay if error else SEND_EVERY_SECONDS)
                self._is_woken = False
            delay = min(2 * delay, RETRY_SECONDS[1]) if error else RETRY_SECONDS[0]

    def _send_all(self) -> str:
        """Returns why it could not, in one line; empty when it could."""
        try:
            while not self._is_stopping and self._uploader.send_batch():
                pass
        except Exception as error:  # whatever goes wrong between here and a server, training goes on
            return one_line(error)
        return ""


class Uploader:
    """Applies the records of a journal to an MLflow store, in order. Applying one again changes nothing."""

    def __init__(self, output_dir: Path, uri: str) -> None:
        """``uri`` empty: SQLite in ``output_dir``."""
        self._output_dir = output_dir
        self._journal = output_dir / FILE_NAME
        self._uri = uri or f"sqlite:///{output_dir / 'mlflow.db'}"
        self.shown_uri = redact(self._uri)
        acknowledged = Acknowledged.load(output_dir)
        # another server than last time has nothing yet
        self.sent = acknowledged if acknowledged and acknowledged.uri == redact(uri) else Acknowledged(redact(uri))
        self.is_abandoned = False
        self._has_refused = False
        self._client = _open_client(self._uri)
        self.sent.save(output_dir)

    def send_batch(self) -> bool:
        """Apply the next batch. False when there is none; any exception means that the server did not take it."""
        batch, num_bytes = read_batch(self._journal, self.sent.num_bytes, max_metrics=MAX_METRICS)
        if num_bytes == self.sent.num_bytes:
            return False
        self._apply(batch)
        if not self.is_abandoned:
            self.sent.num_bytes = num_bytes
            self.sent.save(self._output_dir)
        return True

    def _apply(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if batch and "step" in batch[0]:
                self._log_points(batch)
            elif batch:
                self._apply_one(batch[0])
        except MlflowException as error:
            if error.error_code not in _REFUSALS or "run" in batch[0]:
                raise
            if len(batch) == 1:
                self._say_refused(error)
            for record in batch if len(batch) > 1 else ():
                self._apply([record])

    def _apply_one(self, record: dict[str, Any]) -> None:
        client, run_id, time_ms = self._client, self.sent.run_id, _milliseconds(record)
        if "run" in record:
            self._open_run(record)
        elif "child" in record:
            self._log_child(record)
        elif "params" in record:
            self._log_batch(run_id, params=record["params"])
        elif "tags" in record:
            self._log_batch(run_id, tags=record["tags"])
        elif "resumed_from_step" in record:
            self.sent.repeated_until = dict(self.sent.last_step)
            self._log_batch(run_id, tags={"resumed_from_step": str(record["resumed_from_step"]), "preempted": "false"})
        elif "artifact" in record:
            self._log_artifact(self._output_dir / record["artifact"])
        elif "status" in record:
            client.set_terminated(run_id, record["status"], end_time=time_ms)

    def _open_run(self, record: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        experiment_id, run = self._experiment_id(record["experiment"]), None
        if not record["run"].startswith(PENDING):
            try:
                run = self._client.get_run(record["run"])
            except MlflowException as error:
                if error.error_code not in _REFUSALS:
                    raise
        if run is None or run.info.lifecycle_stage == "deleted":
            run = self._find_or_create(experiment_id, {KEY_TAG: record["run"]}, record["name"], start_time=_milliseconds(record))
        sent = self.sent
        if run.info.run_id != sent.run_id:
            sent.children, sent.last_step, sent.repeated_until = {}, {}, {}
        sent.experiment_id, sent.run_id, sent.run = experiment_id, run.info.run_id, record["run"]
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=self._artifact_location()))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._experiment_id(name)  # another run was faster

    def _artifact_location(self) -> str | None:
        """Beside a SQLite file; a server decides itself."""
        if self._uri.startswith("sqlite:///"):
            return str(Path(self._uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts")
        return None

    def _find_or_create(self, experiment_id: str, tags: dict[str, str], name: str, *, start_time: int) -> Run:
        query = " AND ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found = self._client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1)
        return found[0] if found else self._client.create_run(experiment_id, start_time=start_time, tags=tags, run_name=name)

    def _log_child(self, record: dict[str, Any]) -> None:
        name, time_ms = record["child"], _milliseconds(record)
        if name not in self.sent.children:
            tags = {KEY_TAG: name, "mlflow.parentRunId": self.sent.run_id}
            child = self._find_or_create(self.sent.experiment_id, tags, name, start_time=time_ms)
            self.sent.children[name] = child.info.run_id
        run_id = self.sent.children[name]
        self._log_batch(run_id, params=record["params"])
        self._log_batch(run_id, points=[(key, value, time_ms, 0) for key, value in record["metrics"].items()])
        self._client.set_terminated(run_id, "FINISHED", end_time=time_ms)

    def _log_points(self, batch: list[dict[str, Any]]) -> None:
        """Records of log_metrics, without the steps that were sent before a resume: they are the same training, done twice."""
        points = [
            (key, value, _milliseconds(record), record["step"])
            for record in batch
            for key, value in record["metrics"].items()
            if record["step"] > self.sent.repeated_until.get(key, -1)
        ]
        self._log_batch(self.sent.run_id, points=points)
        for key, _, _, step in points:
            self.sent.last_step[key] = max(step, self.sent.last_step.get(key, -1))

    def _log_batch(
        self,
        run_id: str,
        *,
        points: list[tuple[str, float | str, int, int]] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(key, float(value), time_ms, step) for key, value, time_ms, step in points or ()]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS], synchronous=True)
        if params:
            known = self._client.get_run(run_id).data.params  # MLflow refuses another value for a param that it has
            missing = [Param(key, value) for key, value in params.items() if key not in known]
            for start in range(0, len(missing), MAX_PARAMS):
                self._client.log_batch(run_id, params=missing[start : start + MAX_PARAMS], synchronous=True)
        if tags:
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)

    def _log_artifact(self, path: Path) -> None:
        run_id = self.sent.run_id
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(run_id, str(path))
        except Exception as error:
            self._client.get_run(run_id)  # raises when the server is down; otherwise this one file must not hold up what follows
            self._say_refused(error)

    def _say_refused(self, error: Exception) -> None:
        level = logging.DEBUG if self._has_refused else logging.WARNING  # a deleted run refuses everything: say it once
        logger.log(level, "MLflow at %s refuses a record, which stays in %s only: %s", self.shown_uri, self._journal, one_line(error))
        self._has_refused = True


def replay(output_dir: Path, *, uri: str = "") -> int:
    """Send what the server has not got, and return the number of records. ``uri`` empty: the server of the run."""
    output_dir = output_dir.resolve()
    if not (output_dir / FILE_NAME).is_file():
        raise ConfigError(f"{output_dir}: no {FILE_NAME} there", do="give the output_dir of a run")
    acknowledged = Acknowledged.load(output_dir)
    uri = uri or (acknowledged.uri if acknowledged else "")
    if REDACTED in uri:
        raise ConfigError(f"the password of {uri} is not kept on disk", do="give the whole address with --uri")
    journal = Journal(output_dir)
    uploader = Uploader(output_dir, uri)
    num_records = count_records(journal.path, uploader.sent.num_bytes)
    try:
        while uploader.send_batch():
            pass
    except Exception as error:
        num_unsent = count_records(journal.path, uploader.sent.num_bytes)
        raise ServiceError(
            f"{num_unsent} of {num_records} records not sent: MLflow at {uploader.shown_uri} does not answer: {one_line(error)}",
            do="try again later: what was sent is not sent twice",
        ) from error
    finally:
        journal.close()
    return num_records


def one_line(error: Exception) -> str:
    """The first line of an error, short and without passwords."""
    first, *_ = f"{error}".strip().splitlines() or [type(error).__name__]
    return redact(first if len(first) <= 300 else first[:300] + "…")


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(record["time"] * 1000)


def _open_client(uri: str) -> MlflowClient:
    """A quiet client. A server that does not answer is noticed at its first use, not here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for library in ("mlflow", "alembic"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning per outage, and it is ours
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise ConfigError(f"tracking.uri={redact(uri)}: {one_line(error)}", do="use sqlite:///file or http://host:port") from error

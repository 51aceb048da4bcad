"""Send the records of a journal to an MLflow store. Only this module and ``store`` import mlflow.

Every record is sent at least once, and sending it again changes nothing: MLflow drops a point whose
run, key, step, time and value it already has, a param is logged only when it is missing, and a run
is looked up by its tag before it is created. So nothing is lost or doubled when an answer gets
lost, or when the process is killed before it could save that the answer arrived.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.redaction import redact
from pipeline.tracking import store
from pipeline.tracking.address import sqlite_path
from pipeline.tracking.journal import FILE_NAME, Acknowledged, read_batch
from pipeline.tracking.place import artifact_folder, saved_uri
from pipeline.tracking.store import StoreError, one_line
from pipeline.tracking.tracker import PARENT_TAG, PENDING

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

KEY_TAG = "ticketworks.key"  # identifies a run before the server has given it an id
# The kind of an experiment, as MLflow's pages write it: they then open on the runs and charts of training
# instead of asking, or showing the traces of a language model.
KIND_TAG, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
NOTE_TAG = "mlflow.note.content"  # the description on a run's page, in Markdown
FINAL = "eval/"  # prefix of the metrics of the finished run, which have no step
DIGEST_CHARACTERS = 16  # of a data set, as everywhere in the project; MLflow takes 36 at most
MAX_METRICS, MAX_PARAMS = 1000, 100  # MLflow's limits for one batch
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")

Point = tuple[str, float | str, int, int]  # key, value, time in milliseconds, step


class Uploader:
    """Send the records of one journal to one store, in order."""

    def __init__(self, output_dir: Path, uri: str) -> None:
        """Prepare to send, without opening the store: the first batch does that, and any error of it is an outage.

        Args:
            output_dir: the run's folder.
            uri: the store, see :func:`pipeline.tracking.place.where`.
        """
        self._output_dir = output_dir
        self._journal = output_dir / FILE_NAME
        self._uri, self._database = uri, sqlite_path(uri)
        self.shown_uri = redact(uri)
        last, saved = Acknowledged.load(output_dir), saved_uri(output_dir, uri)
        # a different server than last time has nothing yet
        self.sent = last if last and last.uri == saved else Acknowledged(saved)
        self.is_abandoned = False
        self.is_prepared = threading.Event()  # what takes time without a server is done: the import, a new database
        self._has_rejected = False
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        assert self._opened is not None, "send_batch() opens the store"
        return self._opened

    def send_batch(self) -> bool:
        """Send the next batch; False when there is none. Any exception means that the server did not accept it."""
        try:
            if self._journal.stat().st_size == self.sent.num_bytes:
                return False
            store.import_mlflow()
            if self._database is None or self._database.exists():
                self.is_prepared.set()
            with store.only_writer(self._database):
                if self._opened is None:
                    self._open()
                return self._send_batch()
        except Exception:
            self._close()  # the next attempt may find another file, or a database that was repaired
            raise
        finally:
            self.is_prepared.set()

    def _send_batch(self) -> bool:
        batch, num_bytes = read_batch(self._journal, self.sent.num_bytes, max_metrics=MAX_METRICS)
        if num_bytes == self.sent.num_bytes:
            return False
        if batch:
            self._apply(batch)
        if not self.is_abandoned:
            self.sent.num_bytes = num_bytes
            self.sent.save(self._output_dir)
        return True

    def _open(self) -> None:
        if self._database is not None:
            store.prepare_database(self._database)
        self.is_prepared.set()
        self._opened = store.connect(self._uri)
        if self.sent.run_id and self._find_run(self.sent.run_id) is None:
            # the store was replaced: it has nothing yet
            self.sent = Acknowledged(self.sent.uri, copied_from=self.sent.copied_from)

    def _close(self) -> None:
        if self._opened is not None:
            store.disconnect(self._opened)
            self._opened = None

    def _apply(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if "step" in batch[0]:
                self._apply_metrics(batch)
            else:
                self._apply_other(batch[0])
        except MlflowException as error:
            if error.error_code not in _REFUSALS or "run" in batch[0] or store.is_of_database(error):
                raise
            if len(batch) == 1:
                self._report_rejected(error)
                return
            for record in batch:  # one bad record must not stop the others
                self._apply([record])

    def _apply_metrics(self, batch: list[dict[str, Any]]) -> None:
        """Send metrics, without steps that were sent before a resume: those are repeats of the same training."""
        sent = self.sent
        points = [
            # MLflow's pages draw bars for a metric that has step 0 only, and a curve of one point otherwise
            (key, value, _milliseconds(record), 0 if key.startswith(FINAL) else record["step"])
            for record in batch
            for key, value in record["metrics"].items()
            # a final evaluation that is done again, perhaps with other settings, replaces the first
            if record["step"] > sent.repeated_until.get(key, -1) or key.startswith(FINAL)
        ]
        self._log_points(sent.run_id, points)
        for key, _, _, step in points:
            sent.last_step[key] = max(step, sent.last_step.get(key, -1))

    def _apply_other(self, record: dict[str, Any]) -> None:
        run_id = self.sent.run_id
        if "run" in record:
            self._open_run(record)
        elif "child" in record:
            self._log_child(record)
        elif "params" in record:
            self._log_params(run_id, record["params"])
        elif "tags" in record:
            self._set_tags(run_id, record["tags"])
        elif "resumed_from_step" in record:
            self.sent.repeated_until = dict(self.sent.last_step)
            self._set_tags(run_id, {"resumed_from_step": str(record["resumed_from_step"]), "preempted": "false"})
        elif "input" in record:
            self._log_input(run_id, record)
        elif "artifact" in record:
            self._log_artifact(run_id, self._output_dir / record["artifact"])
        elif "status" in record:
            self._client.set_terminated(run_id, record["status"], end_time=_milliseconds(record))

    def _open_run(self, record: dict[str, Any]) -> None:
        key = record["run"]
        run = None if key.startswith(PENDING) else self._get_run(key)
        if run is None:
            experiment_id = self._experiment_id(record["experiment"])
            run = self._find_or_create(experiment_id, {KEY_TAG: key}, record["name"], start_time=_milliseconds(record))
        else:
            experiment_id = run.info.experiment_id  # of MLFLOW_RUN_ID, it may be another one
        sent = self.sent
        _require_ids(experiment_id, run.info.run_id)
        if run.info.run_id != sent.run_id:
            sent.children, sent.last_step, sent.repeated_until = {}, {}, {}
        sent.experiment_id, sent.run_id, sent.run = experiment_id, run.info.run_id, key
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _get_run(self, run_id: str) -> Run | None:
        """Return a run that can be continued; None, with a warning, if it does not exist or was deleted."""
        run = self._find_run(run_id)
        if run is None or run.info.lifecycle_stage == "deleted":
            logger.warning("MLflow at %s has no run %s, so a new one is created", self.shown_uri, run_id)
            return None
        return run

    def _find_run(self, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in _REFUSALS or store.is_of_database(error):
                raise
            return None

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":
                raise StoreError(f"experiment {name!r} was deleted")
            if KIND_TAG not in found.tags:
                self._client.set_experiment_tag(found.experiment_id, KIND_TAG, MODEL_TRAINING)
            return str(found.experiment_id)
        try:
            location, tags = self._artifact_location(), {KIND_TAG: MODEL_TRAINING}
            return str(self._client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._experiment_id(name)  # another run has just created it

    def _artifact_location(self) -> str | None:
        """Return the address of the folder for artifacts beside a SQLite file; a server chooses its own."""
        folder = artifact_folder(self._uri)
        return None if folder is None else folder.as_uri()

    def _find_or_create(self, experiment_id: str, tags: dict[str, str], name: str, *, start_time: int) -> Run:
        query = " AND ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        found = self._client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1)
        return (
            found[0]
            if found
            else self._client.create_run(experiment_id, start_time=start_time, tags=tags, run_name=name)
        )

    def _log_child(self, record: dict[str, Any]) -> None:
        sent, name, time_ms = self.sent, record["child"], _milliseconds(record)
        if name not in sent.children:
            parent = self._client.get_run(sent.run_id).info.run_name
            tags = {KEY_TAG: name, PARENT_TAG: sent.run_id}
            shown = f"{name} of {parent}"  # beside the children of other runs, "ticket-0" alone says little
            child_id = self._find_or_create(sent.experiment_id, tags, shown, start_time=time_ms).info.run_id
            _require_ids(child_id)
            self._set_tags(child_id, {NOTE_TAG: f"**{name}** of the run **{parent}**, evaluated on its own."})
            sent.children[name] = child_id
        run_id = sent.children[name]
        self._log_params(run_id, record["params"])
        self._log_points(run_id, [(key, value, time_ms, 0) for key, value in record["metrics"].items()])
        self._client.set_terminated(run_id, "FINISHED", end_time=time_ms)

    def _log_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = iter(Metric(key, float(value), time_ms, step) for key, value, time_ms, step in points)
        while batch := list(islice(metrics, MAX_METRICS)):
            self._client.log_batch(run_id, metrics=batch, synchronous=True)

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(run_id).data.params  # MLflow rejects a second value for a param
        missing = iter(Param(key, value) for key, value in params.items() if key not in known)
        while batch := list(islice(missing, MAX_PARAMS)):
            self._client.log_batch(run_id, params=batch, synchronous=True)

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if (parent := tags.get(PARENT_TAG, "")).startswith(PENDING):  # the records of the parent may come later
            found = self._find_or_create(
                self.sent.experiment_id, {KEY_TAG: parent}, "sweep", start_time=round(1000 * time.time())
            )
            tags = {**tags, PARENT_TAG: found.info.run_id}
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)

    def _log_input(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            record["input"],
            record["digest"][:DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": record["source"]}),
            profile=json.dumps(record["profile"]),
        )
        context = InputTag("mlflow.data.context", record["context"])
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, [context])])

    def _log_artifact(self, run_id: str, path: Path) -> None:
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), artifact_path=path.name)
            else:
                self._client.log_artifact(run_id, str(path))
        except Exception as error:
            self._client.get_run(run_id)  # raises when the server is down; otherwise only this file is rejected
            self._report_rejected(error)

    def _report_rejected(self, error: Exception) -> None:
        level = logging.DEBUG if self._has_rejected else logging.WARNING  # a deleted run rejects all: warn once
        logger.log(
            level,
            "MLflow at %s rejected a record, which remains in %s only: %s",
            self.shown_uri,
            self._journal,
            one_line(error),
        )
        self._has_rejected = True


def _require_ids(*ids: object) -> None:
    """Check that the server returned ids; one that accepts everything without ids is not MLflow and loses records."""
    for each in ids:
        if not (isinstance(each, str) and _ID.fullmatch(each)):
            raise ConnectionError(f"its answer has an invalid id {each!r}: is it MLflow?")


def _milliseconds(record: Mapping[str, Any]) -> int:
    return round(float(record["time"]) * 1000)

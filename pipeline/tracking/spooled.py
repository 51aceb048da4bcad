"""A journal, and a thread that sends it to a server.

Training appends a line and continues, whatever the server does.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from pipeline.config.schema import TrackingConfig
from pipeline.errors import ConfigError, ServiceError
from pipeline.redaction import REDACTED
from pipeline.tracking.address import check_address, with_absolute_path
from pipeline.tracking.copied import make_own, original_of
from pipeline.tracking.journal import Acknowledged, Journal, count_records, require_journal
from pipeline.tracking.mlflow_tracker import Uploader
from pipeline.tracking.place import Place, saved_uri, stored_uri, where
from pipeline.tracking.store import advice, one_line
from pipeline.tracking.tracker import JsonLinesTracker

logger = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 5.0
RETRY_SECONDS = (5.0, 60.0)  # doubled from one failure to the next
START_SECONDS = 5.0
PREPARE_SECONDS = 60.0  # for the import of mlflow and a new database, when a store is required
FLUSH_SECONDS = 12.0


class SpooledTracker(JsonLinesTracker):
    """Write lines to ``metrics.jsonl`` and send them to MLflow in the background."""

    def __init__(
        self,
        output_dir: Path,
        *,
        place: Place,
        run_name: str,
        resume_run_id: str = "",
        is_required: bool = False,
    ) -> None:
        output_dir = output_dir.resolve()
        if not place.run_id and (original := original_of(output_dir, saved_uri(output_dir, place.uri))):
            logger.warning("this folder is a copy of %s, so its records go to an MLflow run of its own", original)
            make_own(output_dir)
        last = Acknowledged.load(output_dir)
        if place.run_id and resume_run_id not in ("", place.run_id):
            logger.warning("MLFLOW_RUN_ID=%s is not used: this run continues its own MLflow run", place.run_id)
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            logger.warning("MLFLOW_EXPERIMENT_ID is not used; do: set MLFLOW_EXPERIMENT_NAME")
        if last and resume_run_id and resume_run_id in (last.run_id, *last.copied_from):
            # the journal uses one name throughout, so that it can be replayed to another server
            resume_run_id = last.run
        self._uploader = Uploader(output_dir, place.uri)
        super().__init__(
            output_dir,
            experiment=place.experiment,
            run_name=run_name,
            resume_run_id=resume_run_id or place.run_id,
        )
        self._uploader.sent.save(output_dir)
        self._changed = threading.Condition()
        self._is_woken = self._is_stopping = False
        self._num_batches = self._num_failures = 0  # sent, failed
        self._error: Exception | None = None
        self._is_silent = is_required  # then the start reports the error
        self._setting = place.setting
        self._thread = threading.Thread(target=self._send_until_stopped, name="mlflow", daemon=True)
        self._thread.start()
        if is_required:
            self._require_store()
        else:
            self._wait(self._journal.num_bytes, START_SECONDS)
        logger.info("%s", place.shown)

    @property
    def run_id(self) -> str:
        sent = self._uploader.sent
        return (sent.run_id if sent.run == self._key else "") or self._key

    def flush(self) -> None:
        super().flush()
        self._wait(self._journal.num_bytes, FLUSH_SECONDS)

    def _require_store(self) -> None:
        """Wait for the first records to be sent: a few seconds after mlflow is imported and a new database is made."""
        self._uploader.is_prepared.wait(PREPARE_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: self._num_batches or self._num_failures, START_SECONDS)
            error = None if self._num_batches else self._error or TimeoutError(f"no response in {START_SECONDS:g} s")
        if error is not None:
            self._stop_thread()
            self._journal.close()
            uri = self._uploader.shown_uri
            raise ServiceError(
                f"MLflow at {uri} is not accepting records: {one_line(error)}",
                do=f"{advice(error, uri=uri, setting=self._setting)}, or set tracking.required=false",
            ) from error
        self._is_silent = False

    def _wait(self, num_bytes: int, seconds: float) -> None:
        """Wait until the server has the journal up to ``num_bytes``, an attempt has failed, or time is up."""
        with self._changed:
            failures = self._num_failures
            self._is_woken = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._uploader.sent.num_bytes >= num_bytes or self._num_failures > failures, seconds
            )

    def _stop_thread(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        self._uploader.is_abandoned = True  # if the thread still waits for an answer, it will write nothing afterwards

    def _release(self) -> None:
        self._stop_thread()
        if num_unsent := count_records(self._journal.path, self._uploader.sent.num_bytes):
            logger.warning(
                "%d records have not reached MLflow at %s and are kept in %s; "
                "do: python -m pipeline.tracking replay %s",
                num_unsent,
                self._uploader.shown_uri,
                self._journal.path,
                self._output_dir,
            )
        super()._release()

    def _send_until_stopped(self) -> None:
        """Run in the thread: send all records, then pause. Warns once per outage."""
        uri, journal = self._uploader.shown_uri, self._journal.path
        delay = RETRY_SECONDS[0]
        while not self._is_stopping:
            error = self._send_all()
            if error and not self._error and not self._is_silent:
                logger.warning(
                    "MLflow at %s is not accepting records (%s): training continues and %s is sent later; do: %s",
                    uri,
                    one_line(error),
                    journal,
                    advice(error, uri=uri, setting=self._setting),
                )
            elif self._error and not error:
                logger.info("MLflow at %s is responding again and has all records", uri)
            with self._changed:
                self._error = error
                self._num_failures += bool(error)
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._is_woken or self._is_stopping, delay if error else SEND_EVERY_SECONDS
                )
                self._is_woken = False
            delay = min(2 * delay, RETRY_SECONDS[1]) if error else RETRY_SECONDS[0]

    def _send_all(self) -> Exception | None:
        """Send all records; return the error if that fails."""
        try:
            while not self._is_stopping and self._uploader.send_batch():
                with self._changed:
                    self._num_batches += 1
                    self._changed.notify_all()
        except Exception as error:  # no failure of the server, the network or a library may stop training
            return error
        return None


def replay(output_dir: Path, *, uri: str = "") -> int:
    """Send the records that the server does not have yet.

    Args:
        output_dir: the run's folder.
        uri: the server; empty means the one that the run used, see :func:`pipeline.tracking.place.where`.

    Returns:
        The number of records sent.

    Raises:
        ConfigError: the folder has no journal, or the address lacks its password.
        ServiceError: the server does not accept the records.
    """
    output_dir = output_dir.resolve()
    require_journal(output_dir)
    last = Acknowledged.load(output_dir)
    if uri:
        uri = with_absolute_path(uri)
    else:
        uri = stored_uri(output_dir, last.uri) if last else where(output_dir, TrackingConfig()).uri
    if REDACTED in uri:
        raise ConfigError(
            f"cannot connect to {uri}: its password is not stored on disk",
            do="pass the complete address, with the password, as --uri",
        )
    check_address(uri, setting="--uri")
    uploader = Uploader(output_dir, uri)
    journal = Journal(output_dir)
    num_records = count_records(journal.path, uploader.sent.num_bytes)
    try:
        while uploader.send_batch():
            pass
    except Exception as error:
        num_unsent = count_records(journal.path, uploader.sent.num_bytes)
        raise ServiceError(
            f"{num_unsent} of {num_records} records could not be sent: "
            f"MLflow at {uploader.shown_uri}: {one_line(error)}",
            do=f"{advice(error, uri=uploader.shown_uri, setting='--uri')}, and try again; "
            "records that were sent are not sent twice",
        ) from error
    finally:
        journal.close()
    return num_records

"""Write checkpoints in the background, while training continues."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path

from pipeline.distributed import session
from pipeline.errors import RunError, WriteError
from pipeline.files import SHARE_IT, SHARED_SECONDS, cannot_write, sha256_of, sync_folder, write_atomically

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
LAST_SECONDS = 10.0  # how long a run that ends by an error waits for the checkpoint that is being written
OTHERS_SECONDS = 1.0  # the part of it to wait for other ranks' files, which may never appear


class BackgroundWriter:
    """Writes one checkpoint at a time.

    A thread of each rank writes the files of that rank; a second thread on rank 0 publishes the
    folder. Files appear complete, in a folder that no other run writes to, so that the second thread
    only waits until all of them exist: threads need no collectives. Errors are raised on all ranks
    by :meth:`finish`.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(2, "checkpoint")
        self._written: Future[None] | None = None
        self._published: Future[None] | None = None
        self._is_written_by_all = threading.Event()
        self._is_given_up = threading.Event()

    def start(
        self,
        folder: Path,
        own_files: Mapping[str, Callable[[], bytes]],
        *,
        all_files: Iterable[str],
        publish: Callable[[], None],
    ) -> None:
        """Start writing.

        Args:
            folder: where to write.
            own_files: function that returns the content, by name of the file, for this rank's files.
            all_files: names of the files of all ranks.
            publish: called on rank 0, on its second thread, once ``all_files`` exist.
        """

        def write() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(folder, error) from error
            for name, content in own_files.items():
                # Once the last file exists, rank 0 may rename the folder at any time. Writing the
                # manifest makes all names durable.
                write_atomically(folder / name, content(), is_name_durable=False)

        def wait_and_publish() -> None:
            paths = [folder / name for name in all_files]
            deadline = math.inf
            while missing := [path for path in paths if not path.exists()]:
                if self._is_given_up.wait(POLL_SECONDS):
                    return
                if self._is_written_by_all.is_set():
                    deadline = min(deadline, time.monotonic() + SHARED_SECONDS)
                if time.monotonic() > deadline:
                    raise WriteError(
                        f"{min(missing)}: was written by its rank but is not visible on rank 0", do=SHARE_IT
                    )
            publish()

        assert self._written is None, "one at a time"
        self._is_written_by_all.clear()
        self._is_given_up.clear()
        self._written = self._executor.submit(write)
        self._published = self._executor.submit(wait_and_publish) if session.is_main() else None

    def finish(self) -> None:
        """Wait until the checkpoint is published, or raise its error; all ranks call this together."""
        written, published = self._take()
        if written is None:
            return
        try:
            session.raise_together(_error_of(written))
            self._is_written_by_all.set()
            session.on_main(lambda: published.result() if published is not None else None)
        finally:
            self._is_given_up.set()

    def leave(self) -> None:
        """Wait briefly for the checkpoint after an error, without waiting for other ranks to call this."""
        written, published = self._take()
        futures = [future for future in (written, published) if future is not None]
        deadline = time.monotonic() + LAST_SECONDS
        wait_for(futures[:1], timeout=LAST_SECONDS)
        wait_for(futures, timeout=OTHERS_SECONDS)
        self._is_given_up.set()
        wait_for(futures, timeout=max(0.0, deadline - time.monotonic()))
        for future in futures:
            if future.done() and (error := _error_of(future)):
                logger.error("a checkpoint could not be saved: %s", error)  # not raised: another error ended the run

    def _take(self) -> tuple[Future[None] | None, Future[None] | None]:
        taken, self._written, self._published = (self._written, self._published), None, None
        return taken


def _error_of(future: Future[None]) -> RunError | None:
    """Wait for ``future`` and return its error; raise it if it is not one of the project's own."""
    error = future.exception()
    if error is not None and not isinstance(error, RunError):
        raise error
    return error


def publish(partial: Path, final: Path) -> None:
    """Write the manifest, then give the folder its name."""
    try:
        files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        write_atomically(partial / "manifest.json", json.dumps({"files": files}, indent=1).encode())
        replaced = partial.with_suffix(".replaced")
        if final.exists():  # the same step of the same run was saved before a kill
            final.rename(replaced)
        partial.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise cannot_write(final, error) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left behind. The caller owns the folder, and nothing is being written."""
    for pattern in (".step-*.partial", ".step-*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)

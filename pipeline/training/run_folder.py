"""``output_dir``: one folder shared by all ranks, used by one job of one run at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.distributed import session
from pipeline.distributed.rank_variables import KUBERNETES
from pipeline.errors import IntegrityError, WriteError
from pipeline.files import (
    LOCK_SECONDS,
    SHARE_IT,
    SHARED_SECONDS,
    at_work_in,
    cannot_write,
    only_process_in,
    write_atomically,
)
from pipeline.redaction import redact
from pipeline.training import run_record

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0  # NFS keeps the locks of a machine that has vanished for 90 s


@dataclass(frozen=True)
class RunFolder:
    """``output_dir`` and the identity of the run that owns it."""

    path: Path
    run_id: str


@contextlib.contextmanager
def open_run_folder(config: Config, *, resume: str) -> Iterator[RunFolder]:
    """Make or reuse the run's folder, and reserve it for this job until the end of the block.

    A folder in which a run failed before its first step is treated like an empty one. Every rank
    must call this.

    Raises:
        WriteError: the folder contains the results of a run and ``resume`` is ``none``, another job
            is using it, it cannot be written, or it is not the same folder on all ranks.
        PermissionDenied: this user may not write to it.
    """
    path = Path(config.output_dir)
    held = contextlib.ExitStack()

    def claim() -> str:
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_locked = held.enter_context(only_process_in(path, wait_seconds=_patience_seconds(path, resume)))
            is_there = (path / run_record.NAME).exists()
            # without file locks nobody can know whether another job is still using the folder
            is_over = is_there and is_locked and not run_record.is_occupied(path)
            if is_there and not is_over and resume == "none":
                raise run_record.occupied(path)
            if not is_there or is_over:
                write_atomically(path / "config.yaml", redact(to_yaml(config)).encode())
                run_record.write_run_id(path, config.name)
            return run_record.read_run_id(path)
        except OSError as error:
            raise cannot_write(path, error) from error

    with held:
        run_id = session.on_main(claim)
        session.raise_together(_not_shared(path, run_id))
        yield RunFolder(path, run_id)


def _patience_seconds(folder: Path, resume: str) -> float:
    """Return how long to wait for a process that holds the folder: longer where it may be on a node that was lost."""
    if resume != "auto" or KUBERNETES not in os.environ or not (who := at_work_in(folder)):
        return LOCK_SECONDS
    logger.warning("%s is in use by %s; waiting up to %g s for its node to lose the lock", folder, who, LEASE_SECONDS)
    return LEASE_SECONDS


def _not_shared(folder: Path, run_id: str) -> WriteError | None:
    """Return an error if the file that rank 0 has written does not appear on this rank."""
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IntegrityError):
            if run_record.read_run_id(folder) == run_id:
                return None
        time.sleep(0.1)
    return WriteError(
        f"{folder / run_record.NAME}: was written by rank 0 but is not visible on rank {session.rank()}", do=SHARE_IT
    )

"""``output_dir``: claimed by one job of one run at a time, the same folder on all ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import load as configuration
from pipeline.config.schema import Config
from pipeline.distributed import session
from pipeline.errors import IntegrityError, WriteError
from pipeline.files import SHARE_IT, SHARED_SECONDS, cannot_write, only_process_in, write_atomically
from pipeline.redaction import redact
from pipeline.training import run_record


@dataclass(frozen=True)
class RunFolder:
    """``output_dir`` and the identity of the run that owns it."""

    path: Path
    run_id: str


@contextlib.contextmanager
def open_run_folder(config: Config, *, resume: str) -> Iterator[RunFolder]:
    """Make or take up the run's folder, which is this job's until the end of the block; all ranks together.

    A folder in which a start failed before its first step is taken up like an empty one.

    Raises:
        WriteError: when the folder already holds a run that has got anywhere and ``resume`` is
            ``none``, another job is at work in it, it cannot be written, or is not the same folder
            on all ranks.
        PermissionDenied: when this user may not write there.
    """
    path = Path(config.output_dir)
    held = contextlib.ExitStack()

    def claim() -> str:
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_locked = held.enter_context(only_process_in(path))
            is_there = (path / run_record.NAME).exists()
            # without locks nobody knows whether the job that put its name there is still at work
            is_over = is_there and is_locked and not run_record.is_occupied(path)
            if is_there and not is_over and resume == "none":
                raise run_record.occupied(path)
            if not is_there or is_over:
                write_atomically(path / "config.yaml", redact(configuration.to_yaml(config)).encode())
                run_record.write_run_id(path, config.name)
            return run_record.read_run_id(path)
        except OSError as error:
            raise cannot_write(path, error) from error

    with held:
        run_id = session.on_main(claim)
        session.raise_together(_not_shared(path, run_id))
        yield RunFolder(path, run_id)


def _not_shared(folder: Path, run_id: str) -> WriteError | None:
    """The error of a rank that does not come to see what rank 0 has written: its folder is another one."""
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IntegrityError):
            if run_record.read_run_id(folder) == run_id:
                return None
        time.sleep(0.1)
    return WriteError(
        f"{folder / run_record.NAME}: was written by rank 0 and is not here, on rank {session.rank()}", do=SHARE_IT
    )

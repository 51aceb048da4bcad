"""What a sweep leaves besides its members: the table in four formats, and a parent run in MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.sweep_members import PARENT, Member, Record
from launchers.sweep_table import FORMATS, Table, render
from pipeline import tracking
from pipeline.files import write_atomically
from pipeline.tracking.tracker import Tracker
from pipeline.training.description import MAX_NOTE_CHARACTERS, NOTE


@contextlib.contextmanager
def open_parent_run(record: Record, members: Sequence[Member]) -> Iterator[Tracker]:
    """Open the run in MLflow whose children the members are, for as long as the block lasts."""
    config = members[0].config
    axes = {name: sorted({member.values[name] for member in members}) for name in members[0].values}
    with tracking.open_tracker(
        config.tracking,
        output_dir=record.folder / PARENT,
        run_name=f"{config.name} sweep {record.folder.name}",
        resume_run_id=record.tracker_run,
    ) as tracker:
        record.tracker_run = tracker.run_id
        record.save()
        tracker.log_params({"name": config.name} | axes | {"seeds": sorted({member.seed for member in members})})
        yield tracker


def publish(table: Table, folder: Path, tracker: Tracker) -> None:
    """Write ``table.txt``, ``.md``, ``.csv`` and ``.json``, and give them to the tracker.

    Raises:
        WriteError, PermissionDenied: a file cannot be written.
    """
    for kind, ending in FORMATS.items():
        path = folder / f"table.{ending}"
        write_atomically(path, render(table, kind).encode())
        tracker.log_artifact(path)
    tracker.set_tags({NOTE: render(table, "markdown")[:MAX_NOTE_CHARACTERS]})

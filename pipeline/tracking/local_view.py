"""Copy the records of several runs into one new SQLite store, to look at them side by side.

The runs' own folders and stores are only read: they may be on read-only or network storage, and a
run may still be writing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError, ServiceError
from pipeline.files import parse_json
from pipeline.tracking.address import sqlite_uri
from pipeline.tracking.final import missing_final_metrics
from pipeline.tracking.journal import FILE_NAME, read_records
from pipeline.tracking.mlflow_tracker import Uploader
from pipeline.tracking.place import DATABASE, RecordedRun
from pipeline.tracking.store import one_line

EXPERIMENT = "comparison"  # MLflow's charts show the runs of one experiment


def copy_runs(output_dirs: Sequence[Path], folder: Path) -> list[RecordedRun]:
    """Copy the runs into a new store in ``folder``, with their artifacts, and return them there, in order.

    Args:
        output_dirs: the runs' folders, with their ``metrics.jsonl``.
        folder: an empty folder.

    Raises:
        ConfigError: a folder has no record of a run.
        ServiceError: a run cannot be copied.
    """
    uri = sqlite_uri(folder / DATABASE)
    runs = []
    for index, output_dir in enumerate(output_dirs):
        if not any("run" in record for record in read_records(output_dir)):
            raise ConfigError(
                f"{output_dir / FILE_NAME}: does not contain the record that is written when a run starts, so it is "
                "damaged or incomplete",
                do="pass the output_dir of another run",
            )
        stand_in = folder / "runs" / str(index)
        _stand_in_for(output_dir.resolve(), stand_in)
        uploader = Uploader(stand_in, uri)
        try:
            while uploader.send_batch():
                pass
        except Exception as error:
            what = f"{output_dir}: cannot be copied to {folder}: {one_line(error)}"
            raise ServiceError(what, do="free some disk space, or set TMPDIR to another folder") from error
        runs.append(RecordedRun(uri, uploader.sent.run_id, uploader.sent.experiment_id))
    return runs


def _stand_in_for(output_dir: Path, stand_in: Path) -> None:
    """Make a folder that looks like the run's, but whose journal names another experiment and is sent to nobody yet."""
    stand_in.mkdir(parents=True)
    for path in output_dir.iterdir():
        if path.name not in (FILE_NAME, DATABASE) and not path.name.startswith(("metrics.", ".metrics.")):
            (stand_in / path.name).symlink_to(path)
    with (output_dir / FILE_NAME).open("rb") as lines, (stand_in / FILE_NAME).open("wb") as copy:
        for line in lines:
            copy.write(_with_experiment(line if line.endswith(b"\n") else line + b"\n"))
        if final := missing_final_metrics(read_records(output_dir)):
            copy.write(json.dumps({"step": 0, "metrics": final, "time": time.time()}).encode() + b"\n")


def _with_experiment(line: bytes) -> bytes:
    """Return a line of the journal, with the experiment of the view if it opens a run."""
    if not line.startswith(b'{"run"'):
        return line
    try:
        record = parse_json(line)
    except ValueError:
        return line  # unfinished or damaged: the reader skips it
    return json.dumps(record | {"experiment": EXPERIMENT}).encode() + b"\n"

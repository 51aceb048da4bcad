"""A copy of a run's folder, made with ``cp -r``, gets an MLflow run of its own when it is continued.

Without this, the copy and the original would write into one MLflow run. A folder that was moved
keeps its MLflow run: nothing is left where it was.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path

from pipeline.files import parse_json
from pipeline.tracking.journal import FILE_NAME, Acknowledged
from pipeline.tracking.tracker import PENDING


def original_of(output_dir: Path, uri: str) -> Path | None:
    """Return the run's folder that ``output_dir`` is a copy of, if records of both would go into one MLflow run.

    Args:
        output_dir: the folder of a run, absolute.
        uri: the store that its records go to, as :func:`pipeline.tracking.place.saved_uri` writes it.
    """
    sent = Acknowledged.load(output_dir)
    if sent is None or not sent.folder or not sent.run_id or not uri or sent.uri != uri:
        return None
    other = Path(sent.folder)
    with suppress(OSError):
        if other.samefile(output_dir):
            return None
        theirs = Acknowledged.load(other)
        if theirs is not None and (theirs.uri, theirs.run_id) == (uri, sent.run_id):
            return other
    return None


def make_own(output_dir: Path) -> None:
    """Give all runs in the record of a copied folder new names, under which they are sent again.

    The ids of the original are kept as ``copied_from``: a checkpoint of the copied folder names them.
    """
    sent = Acknowledged.load(output_dir)
    assert sent is not None
    new = {sent.run: PENDING + uuid.uuid4().hex}
    new[sent.run_id] = new[sent.run]
    path = output_dir / FILE_NAME
    temporary = output_dir / f".{FILE_NAME}.tmp"
    with path.open("rb") as old, temporary.open("wb") as file:
        for line in old:
            if line.startswith(b'{"run": '):
                with suppress(ValueError):
                    record = parse_json(line)
                    record["run"] = new.setdefault(record["run"], PENDING + uuid.uuid4().hex)
                    line = json.dumps(record).encode() + b"\n"
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    own = Acknowledged(sent.uri, run=new[sent.run], copied_from=[*sent.copied_from, *new])
    own.save(output_dir)

"""Where a crash file goes."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from launchers import crash
from pipeline.files import cannot_write


def test_a_crash_file_that_the_full_run_folder_cannot_take_goes_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    for folder in (run, temporary):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def written() -> Path:
        return Path(crash.write_crash_file(KeyError("x"), output_dir=run, config=None, rank="0", step=3))

    assert written() == run / "crash-rank0.txt"

    def full(path: Path, content: bytes) -> None:
        raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), num_bytes=len(content))

    monkeypatch.setattr(crash, "write_atomically", full)
    assert written().parent == temporary
    assert "KeyError: 'x'" in written().read_text()

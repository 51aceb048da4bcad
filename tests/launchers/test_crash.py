"""Where a crash file goes."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from launchers import crash
from launchers.ending import ending
from pipeline.errors import SessionEnd, set_session_end
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


def test_a_gpu_without_memory_ends_in_one_line_that_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.1 GiB is"
    with ending() as end:
        end.output_dir = tmp_path
        error = torch.OutOfMemoryError(f"{said} free.\nException raised from malloc")
        set_session_end(error, SessionEnd(step=7, is_reported_elsewhere=False))
        raise error
    assert end.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"ERROR[64] rank=0 step=7 the GPU has too little free memory: {said} free.; do: raise train.acc"
    )
    assert "OutOfMemoryError" in (tmp_path / "crash-rank0.txt").read_text()

"""What a run shows, and that nothing which happens to its output ends it: on terminals, full disks and in ASCII."""

from __future__ import annotations

import os
import sys

from tests.end_to_end.fault_runs import Runs


def without_output(rank: int, *, how: str) -> None:
    """Take stdout away, or its encoding, before the run starts."""
    if how == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


def test_no_output_ends_a_run(runs: Runs) -> None:
    for how in ("full", "ascii"):
        runs.output = runs.folder / how
        job = runs.start(ranks=1, call=f"{__name__}:without_output", how=how)
        assert job.wait() == [0], job.text[-4000:]
        assert (runs.output / "report" / "report.html").exists()
        assert "Traceback" not in job.text and "Logging error" not in job.text
        if how == "full":
            lost = "warning: lines of the log are missing: No space left on device; the files of the run are complete"
            assert lost in job.text
        else:
            assert "train x  test x" in job.text and job.text.isascii()

"""Give 408 bad inputs to the commands that a user would type.

``python -m tests.campaigns.bad_inputs``

Each must end with one ``ERROR[code]`` line that says what is wrong, with the right exit code, within
five seconds, and without traceback, hang or signal. Prints N/N and the slowest; exits with 1 if any
ends differently.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns import (
    bad_configurations,
    bad_data,
    bad_parts,
    bad_runs,
    bad_saved,
    bad_sweeps,
    bad_tracking,
    bad_verification,
)
from tests.campaigns.cases import Case, Good, make_good
from tests.support.launch import ROOT

CASES: list[Case] = [
    *bad_configurations.CASES,
    *bad_data.CASES,
    *bad_saved.CASES,
    *bad_sweeps.CASES,
    *bad_runs.CASES,
    *bad_tracking.CASES,
    *bad_verification.CASES,
    *bad_parts.CASES,
    *bad_configurations.UNWORKABLE,
    *bad_configurations.BEFORE_A_RUN,
]
MAX_SECONDS = 5.0
HANG_SECONDS = 60.0
ERROR = re.compile(r"ERROR\[(\d+)\] (rank=0 )?\S.*")
LISTED = re.compile(
    r"unusable image: .*|… and \d+ more|[\w ./]+: \d+ of \d+ images.*"
)  # of the images of a set, before the one error
SECRET = "hunter2secret"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How one command ended. ``problem`` is empty if it ended as expected."""

    case: Case
    seconds: float
    processor_seconds: float
    problem: str
    line: str


def meet(case: Case, good: Good, folder: Path, *, max_seconds: float = MAX_SECONDS) -> Outcome:
    """Make the input in ``folder`` and run the command on it."""
    folder.mkdir(parents=True)
    command = case.make(good, folder)
    environ = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    started, used = time.monotonic(), _processor_seconds()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environ | case.environ, capture_output=True, timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome(case, HANG_SECONDS, _processor_seconds() - used, "hangs", "")
    seconds = time.monotonic() - started
    out, err = (text.decode(errors="backslashreplace") for text in (done.stdout, done.stderr))
    lines = [line for line in err.splitlines() if not LISTED.fullmatch(line)]
    line = lines[-1] if lines else ""
    problems = [
        f"exit code {done.returncode}, not {case.code}" * (done.returncode != case.code),
        f"{len(lines)} lines on stderr" * (len(lines) != 1),
        "no ERROR line" * (not ((match := ERROR.fullmatch(line)) and int(match[1]) == case.code)),
        f"does not say {case.expects!r}" * (case.expects not in line),
        "a traceback" * ("Traceback" in out + err),
        "a secret" * (SECRET in out + err),
        "a control character" * bool(re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)),
        f"{seconds:.1f} s" * (seconds >= max_seconds),
    ]
    return Outcome(case, seconds, _processor_seconds() - used, "; ".join(filter(None, problems)), line or out[-300:])


def _processor_seconds() -> float:
    """Return the processor time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="try only every N-th input (default: 1, all of them)"
    )
    parser.add_argument(
        "--first", type=int, default=0, metavar="I", help="start with input number I, counted from 0 (default: 0)"
    )
    parser.add_argument(
        "--kind", choices=sorted({case.kind for case in CASES}), help="try only inputs of this kind (default: all)"
    )
    parser.add_argument("--show", action="store_true", help="print the message that each input causes")
    given = parser.parse_args(arguments)
    chosen = [case for case in CASES if given.kind in (None, case.kind)][given.first :: given.every]
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as root:
        good = make_good(Path(root, "good"))
        outcomes = []
        for number, case in enumerate(chosen):
            outcome = meet(case, good, Path(root, str(number)))
            outcomes.append(outcome)
            if outcome.problem or given.show:
                mark, what = ("WRONG", outcome.problem) if outcome.problem else ("ok", outcome.line)
                print(f"{mark:6}{case.kind}: {case.name[:80]!r}: {what}", flush=True)
                if outcome.problem:
                    print(f"      {outcome.line}", flush=True)
    met = [outcome for outcome in outcomes if not outcome.problem]
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    counts = Counter(outcome.case.kind for outcome in met)
    print(
        f"{len(met)}/{len(chosen)} as expected: " + ", ".join(f"{num} {kind}" for kind, num in sorted(counts.items()))
    )
    seconds = f"{slowest.seconds:.2f} s ({slowest.processor_seconds:.2f} s of processor)"
    print(f"slowest {seconds}: {slowest.case.kind}: {slowest.case.name[:80]!r}")
    return 0 if len(met) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Kill a sweep at random until it is done: ``python -m tests.campaigns.sweep``.

2 methods × 2 densities × 3 seeds of a run of a few seconds, two at once. One sweep is left alone. Another one is ended
again and again after a random time and started again with the same command: by SIGTERM or SIGINT, after which no
member may be left, by SIGKILL of the sweep, which its members survive, of the sweep and all members, or of one member.
It must end with the same table, bit for bit. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.support import sweeps
from tests.support.launch import kill, start

SETS = ("--set", "sparsity.method=set,rigl_itop", "--set", "sparsity.density=0.1,0.2")
ENDS = ("SIGTERM", "SIGINT", "SIGKILL", "SIGKILL to all", "SIGKILL to a member")
MAX_SECONDS = 1800.0


def table_of(folder: Path) -> str:
    """Return all numbers of the finished sweep, without the paths of logs."""
    content = json.loads((folder / "table.json").read_text())
    assert content["failed"] == {} and content["num_missing"] == 0, content
    return json.dumps(content["rows"], sort_keys=True)


def end(process: subprocess.Popen[bytes], how: str) -> bool:
    """End the sweep, or one of its members; return whether the sweep was still running."""
    members = psutil.Process(process.pid).children() if process.poll() is None else []
    if process.poll() is not None or (how == "SIGKILL to a member" and not members):
        return False
    if how in ("SIGTERM", "SIGINT"):
        process.send_signal(getattr(signal, how))
        code = process.wait(120)
        assert code in (0, 1, 75, 130, -signal.SIGTERM), f"exit code {code} after {how}"
        assert not any(member.is_running() for member in members), "a member is left"
    elif how == "SIGKILL":
        process.kill()
        process.wait()
    elif how == "SIGKILL to all":
        kill(process)
    else:
        random.choice(members).kill()
    return True


def undisturbed(command: Sequence[str], log: Path) -> float:
    """Run a sweep to its end; return the seconds that it took."""
    started = time.monotonic()
    process = start(command, log=log)
    try:
        assert process.wait(MAX_SECONDS) == 0, log.read_text()
    finally:
        kill(process)
    return time.monotonic() - started


def disturbed(command: Sequence[str], log: Path, *, num_ends: int, mean_seconds: float) -> Counter[str]:
    """Run a sweep to its end, which comes ``num_ends`` times before it is done; return how often it was ended how."""
    counts: Counter[str] = Counter()
    deadline = time.monotonic() + MAX_SECONDS
    while True:
        process = start(command, log=log)
        try:
            while counts.total() < num_ends and process.poll() is None:
                time.sleep(random.expovariate(1 / mean_seconds))
                how = random.choice(ENDS)
                counts[how] += end(process, how)
                if process.poll() is not None:
                    break
            code = process.wait(max(1.0, deadline - time.monotonic()) if counts.total() >= num_ends else 120)
        finally:
            # SIGKILL to the sweep alone leaves its members to the next one
            if process.poll() is None:
                kill(process)
        if code == 0:
            return counts
        assert code in (1, 75, 130, -signal.SIGTERM, -signal.SIGKILL), f"exit code {code}\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"not done after {MAX_SECONDS:g} s\n{log.read_text()[-3000:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every combination (default 3)")
    parser.add_argument("--ends", type=int, default=10, help="how often the sweep is ended (default 10)")
    parser.add_argument("--jobs", type=int, default=2, help="members at once (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and kinds of ends")
    given = parser.parse_args(arguments)
    random.seed(given.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would sweeps
    with tempfile.TemporaryDirectory(prefix="sweep-") as root:
        configuration = sweeps.make_configuration(Path(root, "images"))
        options = ["--config", str(configuration), *SETS, "--seeds", str(given.seeds), "--jobs", str(given.jobs)]
        folders = Path(root, "alone"), Path(root, "ended")
        commands = [sweeps.command(*options, "--output", folder) for folder in folders]
        seconds = undisturbed(commands[0], Path(root, "alone.log"))
        print(Path(root, "alone.log").read_text(), flush=True)
        counts = disturbed(
            commands[1], Path(root, "ended.log"), num_ends=given.ends, mean_seconds=seconds / (2 * given.ends)
        )
        resumed = sum(log.read_text().count("resumed from") for log in folders[1].glob("*/sweep.log"))
        ends = ", ".join(f"{num} {how}" for how, num in sorted(counts.items()) if num)
        print(f"{4 * given.seeds} runs in {seconds:.0f} s; ended {counts.total()} times ({ends}), {resumed} resumes")
        is_same = table_of(folders[0]) == table_of(folders[1])
        print("both tables are equal" if is_same else "DIFFERS: the two tables")
        return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())

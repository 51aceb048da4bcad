"""Kill ``data_prep`` at random moments, and fill its disk.

    python -m tests.campaigns.data_prep_kills [--kills 50] [--disks 10] [--seed 0]

Nothing new may stand under a final name, nothing may be left behind, and one line must say why.
Each kill ends a process that writes an image folder, by SIGKILL, SIGTERM, SIGINT, or SIGKILL to one
of its workers, at a moment drawn from the time that an undisturbed run takes. Half of the runs find
an older set, which must stay whole until the new one replaces it. Each disk is a tmpfs that is too
small by a different amount (needs root). Prints what is wrong, and exits with 1 if anything is.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from data_prep.__main__ import main as data_prep
from pipeline.datasets.sidecar import sidecar_path, verify
from pipeline.errors import PeerError, WriteError
from tests.support.imagenet_shaped import make_image_folder

NUM_WORKERS = 2
FINAL = {"train.beton", "train.beton.json", "val.beton", "val.beton.json"}
PARTIAL = {
    name for split in ("train", "val") for name in (f".{split}.beton.partial", f".{split}.beton.partial.json")
} | {".writable"}
END_SECONDS = 30.0  # a killed run must end within this time
ENDED = "ended before"
EARLY = (signal.SIGTERM, signal.SIGINT)
MISSING, NO_SIDECAR = "missing", "no sidecar"
CODES = {
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": 128 + signal.SIGTERM,
    "SIGINT": 128 + signal.SIGINT,
    "worker": PeerError.code,
}


@dataclass(frozen=True)
class Writer:
    """A writing process, started by fork: otherwise most kills would hit the slow import of ffcv."""

    child: psutil.Process
    output: Path
    log: Path

    def wait(self) -> int | None:
        """Return its exit code; None if it did not end."""
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            ended, status = os.waitpid(self.child.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None


def start(source: Path, output: Path, *, log: Path, quality: int = 90) -> Writer:
    """Start ``python -m data_prep image-folder`` in another process."""
    folders = ["--train", f"{source}/train", "--val", f"{source}/val", "--output", str(output)]
    how = ["--write-mode", "jpg", "--jpeg-quality", str(quality), "--workers", str(NUM_WORKERS), "--chunk-size", "10"]
    log.write_bytes(b"")
    signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)  # until the child can answer
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(log, os.O_WRONLY), 2)
            os.dup2(2, 1)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)  # under pytest they would be its streams
            for number in EARLY:
                signal.signal(number, _end_early)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)
            os._exit(data_prep(["image-folder", *folders, *how]))
        finally:  # whatever happens, the child must not continue as the campaign
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)
    return Writer(psutil.Process(child), output, log)


def _end_early(number: int, _frame: FrameType | None) -> None:
    """Handle a signal before ``data_prep`` installs its handlers, or after it removes them."""
    os.write(2, f"ERROR[{128 + number}] stopped at its start or end\n".encode())
    os._exit(128 + number)


def digests_in(folder: Path) -> list[str]:
    """Read each split in full; returns its digest, or why there is none."""

    def digest(path: Path) -> str:
        if not path.exists():
            return MISSING
        return verify(path, level=2).digest if sidecar_path(path).exists() else NO_SIDECAR

    return [digest(folder / name) for name in ("train.beton", "val.beton")]


def shared_memory() -> set[str]:
    """Return the names that Python's multiprocessing has in shared memory."""
    return {path.name for pattern in ("psm_*", "pym-*", "sem.*") for path in Path("/dev/shm").glob(pattern)}


def wrong_after_kill(
    run: Writer, how: str, *, after_seconds: float, draw: random.Random, leftovers: set[str], sets: list[list[str]]
) -> tuple[str, str]:
    """Kill ``run`` after that time.

    ``leftovers`` of an earlier run that was killed by SIGKILL remain if this run ends before it
    replaces them. ``sets`` are the digests that may be there at the end.

    Returns:
        How the run ended, and what is wrong (empty: nothing).
    """
    time.sleep(after_seconds)
    workers = run.child.children(recursive=True)
    while how == "worker" and not workers and run.child.status() != psutil.STATUS_ZOMBIE:  # too early to have a worker
        time.sleep(0.001)
        workers = run.child.children(recursive=True)
    if how != "worker":
        run.child.send_signal(signal.Signals[how])
    elif workers:
        draw.choice(workers).send_signal(signal.SIGKILL)
    code = run.wait()
    if code is None:
        run.child.kill()
        run.wait()
        return "hung", f"did not end within {END_SECONDS:g} s"
    problems = list(
        _problems_with_files(
            run, was_cleaned=how != "SIGKILL", is_done=code == 0, leftovers=leftovers if code else set()
        )
    )
    if (found := digests_in(run.output)) not in (sets if code else sets[-1:]) and not (
        how == "SIGKILL" and NO_SIDECAR in found
    ):
        problems.append(f"holds {found}, not one of {sets}")
    psutil.wait_procs(workers, timeout=10)
    if any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        problems.append("a worker outlived the run")
    lines = [line for line in run.log.read_text().splitlines() if line.startswith("ERROR[")]
    if code not in (0, CODES[how]):
        problems.append(f"exit code {code}: {run.log.read_text()[-500:]}")
    if code > 0 and (len(lines) != 1 or not lines[0].startswith(f"ERROR[{code}] ")):
        problems.append(f"expected one line that says why, got {lines}")
    return ENDED if code == 0 else f"exit {code}", "; ".join(problems)


def _problems_with_files(run: Writer, *, was_cleaned: bool, is_done: bool, leftovers: set[str]) -> list[str]:
    names = {path.name for path in run.output.iterdir()} if run.output.exists() else set()
    problems = []
    if names & FINAL not in (set(), FINAL) and not names & PARTIAL:
        problems.append(f"only {sorted(names & FINAL)} under their final names")
    if is_done and names != FINAL:
        problems.append(f"finished, and left {sorted(names)}")
    if was_cleaned and names - FINAL - leftovers:
        problems.append(f"left {sorted(names - FINAL - leftovers)}")
    if unknown := {name for name in names - FINAL - PARTIAL if not name.endswith(".partial.json.tmp")}:
        problems.append(f"unknown files {sorted(unknown)}")
    return problems


def kill_all(root: Path, source: Path, *, num: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill ``num`` runs; returns the number that ended as expected.

    Runs that end before they are killed are not counted.
    """
    draw, output, log = random.Random(seed), root / "out", root / "log"
    started = time.monotonic()
    whole = start(source, output, log=log)
    assert whole.wait() == 0, log.read_text()
    seconds = time.monotonic() - started
    older = root / "older"
    earlier = start(source, older, log=log, quality=50)
    assert earlier.wait() == 0, log.read_text()
    old, new = digests_in(older), digests_in(output)
    num_killed, num_bad, outcomes = 0, 0, Counter[str]()
    before = shared_memory()
    for index in range(4 * num):
        how = tuple(CODES)[num_killed % len(CODES)]
        _remove_final(output)  # other leftovers stay: the next run must cope with them
        if is_over_older := draw.random() < 0.5:
            for path in older.iterdir():
                os.link(path, output / path.name)
        after = draw.uniform(0, seconds)
        leftovers = {path.name for path in output.iterdir()}
        sets = [old if is_over_older else [MISSING, MISSING], new]
        run = start(source, output, log=log)
        outcome, wrong = wrong_after_kill(run, how, after_seconds=after, draw=draw, leftovers=leftovers, sets=sets)
        if left := shared_memory() - before:
            wrong += f"; left in /dev/shm: {sorted(left)}"
        if wrong:
            say(f"kill {index} ({how} after {after:.2f} s{', over an older set' * is_over_older}): {wrong}")
        num_bad += bool(wrong)
        if outcome == ENDED:
            seconds = min(seconds, 1.1 * after)
        else:
            num_killed += 1
            outcomes[f"{how}: {outcome}"] += 1
        if num_killed == num:
            break
    last = start(source, output, log=log)
    assert last.wait() == 0 and not _problems_with_files(last, was_cleaned=True, is_done=True, leftovers=set()), (
        log.read_text()
    )
    say(
        f"kills {num_killed - num_bad}/{num}"
        f" ({', '.join(f'{what} {count}' for what, count in sorted(outcomes.items()))})"
    )
    return num_killed - num_bad


def fill_all(root: Path, source: Path, *, num: int, say: Callable[[str], None]) -> int:
    """Write to ``num`` disks that are too small; returns the number of runs that ended as expected."""
    place, log = root / "disk", root / "log"
    place.mkdir()
    whole = start(source, root / "whole", log=log)
    assert whole.wait() == 0, log.read_text()
    needed_kib = sum(-(-path.stat().st_blocks // 2) for path in (root / "whole").iterdir())
    num_good = 0
    before = shared_memory()
    for index in range(num):
        size_kib = (
            max(64, needed_kib - 4) if index == 0 else needed_kib * index // num
        )  # the first disk fills up while the last file is written
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(place)], check=True)
        try:
            run = start(source, place, log=log)
            code = run.wait()
            left = sorted(path.name for path in place.iterdir())
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        lines = [line for line in log.read_text().splitlines() if line.startswith("ERROR[")]
        is_good = (
            code == WriteError.code
            and not left
            and len(lines) == 1
            and "no space" in lines[0]
            and shared_memory() <= before
        )
        num_good += is_good
        if not is_good:
            say(f"disk of {size_kib} KiB: exit {code}, left {left}, says {lines or log.read_text()[-500:]}")
    say(f"full disks {num_good}/{num}, of 0 to {needed_kib - 4} KiB where {needed_kib} are needed")
    return num_good


def _remove_final(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in FINAL:
            path.unlink()


def run_campaign(*, kills: int, disks: int, seed: int, say: Callable[[str], None] = print) -> bool:
    """Writer the campaign; returns whether everything was as expected."""
    import data_prep.writer  # noqa: F401  ffcv, once for all children

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_image_folder(root / "images", num_classes=4, train_per_class=50, val_per_class=5, sides=(150, 250))
        num_good = kill_all(root, root / "images", num=kills, seed=seed, say=say)
        return (num_good, fill_all(root, root / "images", num=disks, say=say) if disks else 0) == (kills, disks)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of runs to kill (default: 50)")
    parser.add_argument(
        "--disks", type=int, default=10, metavar="N", help="number of runs on a disk that is too small (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choices (default: 0)")
    given = parser.parse_args()
    return 0 if run_campaign(kills=given.kills, disks=given.disks, seed=given.seed) else 1


if __name__ == "__main__":
    sys.exit(main())

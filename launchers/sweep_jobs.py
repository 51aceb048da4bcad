"""Run the members of a sweep: each a process of launchers/train.py, several at once, stopped together by a signal."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.sweep_members import LOG, Member, Record
from pipeline.distributed.gpus import num_gpus
from pipeline.errors import Preempted
from pipeline.files import at_work_in, cannot_write
from pipeline.limits import omp_threads, usable_cpus
from pipeline.redaction import redact
from pipeline.tracking import PARENT_RUN

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TAIL_BYTES = 1 << 16
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class HowToRun:
    """How members are started."""

    config: str  # as given with --config
    num_jobs: int = 1  # members at once
    num_ranks: int = 1  # of each member, under launchers.run if there are several
    num_threads: int = 0  # CPU threads of each rank; 0: an equal share of the CPUs for each, or as configured

    def command(self, member: Member) -> list[str]:
        """Return the command line that starts the member, or continues it."""
        supervisor = ["-m", "launchers.run", "--nproc-per-node", str(self.num_ranks), "--"]
        head = [sys.executable, *(supervisor if self.num_ranks > 1 else []), str(ROOT / "launchers" / "train.py")]
        threads = self.threads_of(member)
        own = [f"train.threads_per_rank={threads}"] if threads != member.config.train.threads_per_rank else []
        return [*head, "--config", self.config, "--resume", "auto", *member.settings, *own]

    def threads_of(self, member: Member) -> int:
        """Return the CPU threads of each rank: as asked for, as configured, or a share if members run at once."""
        configured = self.num_threads or member.config.train.threads_per_rank
        if configured or self.num_jobs == 1 or omp_threads():  # the member itself reads OMP_NUM_THREADS
            return configured
        return max(1, usable_cpus() // (self.num_jobs * self.num_ranks))

    def environment(self, slot: int, *, parent_run: str) -> dict[str, str]:
        """Return the environment of a member in a slot from 0, with GPUs of its own if there are any."""
        environ = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        environ.pop("MLFLOW_RUN_ID", None)  # it is the parent's
        if parent_run:
            environ[PARENT_RUN] = parent_run
        if self.num_jobs > 1 and (gpus := num_gpus()):
            names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
            own = [names[(slot * self.num_ranks + rank) % gpus] for rank in range(self.num_ranks)]
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environ


@dataclass
class _Running:
    member: Member
    process: subprocess.Popen[bytes]
    started: float


def run_members(members: Sequence[Member], record: Record, how: HowToRun) -> None:
    """Run the members that are not done, and record how each ended; one that fails does not end the others.

    A member that a killed sweep left running is waited for.

    Raises:
        Preempted: a signal asked to stop; all members have been stopped and can be continued.
    """
    waiting = [member for member in members if not record.is_done(member.name)]
    running: dict[int, _Running] = {}
    num_done, asked = len(members) - len(waiting), _signals_from_now_on()
    num_heeded = 0
    with _none_left(running):
        while running or (waiting and not asked):
            for slot in [slot for slot in range(how.num_jobs) if slot not in running and not asked]:
                if (member := _next(waiting, record.folder)) is not None:
                    waiting.remove(member)
                    running[slot] = _start(member, record, how, slot)
            for slot, one in list(running.items()):
                if (code := one.process.poll()) is not None:
                    del running[slot]
                    if code and (who := at_work_in(record.folder / one.member.name)):
                        logger.info("%s: is still run by %s, which is waited for", one.member.name, who)
                        waiting.append(one.member)
                        continue
                    seconds = time.monotonic() - one.started
                    num_done += code == 0
                    outcome = None if code and asked else code
                    record.ended(one.member.name, outcome, seconds)
                    _say_ended(one.member, record.folder, outcome, f"{num_done} of {len(members)} done", seconds)
            if num_heeded < len(asked):
                num_heeded = len(asked)
                _stop([one.process for one in running.values()], at_once=num_heeded > 1)
            time.sleep(POLL_SECONDS)
    if asked and num_done < len(members):
        raise Preempted(f"sweep stopped by a signal: {num_done} of {len(members)} runs are done")


@contextmanager
def _none_left(running: Mapping[int, _Running]) -> Iterator[None]:
    """Stop the members that run when an error ends the block, such as a full disk, and wait for them."""
    try:
        yield
    finally:
        processes = [one.process for one in running.values()]
        if processes:
            _stop(processes, at_once=False)
        for process in processes:
            process.wait()


def _signals_from_now_on() -> list[int]:
    """Return a list to which every signal that asks to stop is appended."""
    asked: list[int] = []
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: asked.append(number))
    return asked


def _next(waiting: Sequence[Member], folder: Path) -> Member | None:
    """Return the first member that no process runs already, as those of a killed sweep may still do."""
    return next((member for member in waiting if not at_work_in(folder / member.name)), None)


def _start(member: Member, record: Record, how: HowToRun, slot: int) -> _Running:
    folder = record.folder / member.name
    command, environ = how.command(member), how.environment(slot, parent_run=record.tracker_run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("ab") as log:
            log.write(f"$ {redact(shlex.join(command))}\n".encode())
            log.flush()
            # in a session of its own, so that a Ctrl-C in the terminal reaches it once, through the handler
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environ
            )
    except OSError as error:
        raise cannot_write(folder / LOG, error) from error
    logger.info("%s: process %d, log %s", member.name, process.pid, folder / LOG)
    return _Running(member, process, time.monotonic())


def _stop(processes: Sequence[subprocess.Popen[bytes]], *, at_once: bool) -> None:
    """Ask members to save a checkpoint and stop; ``at_once``: kill them and all their ranks."""
    import psutil

    logger.info("%s", "killing the runs" if at_once else "stopping: each run saves a checkpoint")
    for process in processes:
        if not at_once:
            process.terminate()
            continue
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            for victim in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()


def _say_ended(member: Member, folder: Path, code: int | None, progress: str, seconds: float) -> None:
    if code == 0:
        logger.info("%s: done in %.0f s (%s)", member.name, seconds, progress)
    elif code is None:
        logger.info("%s: stopped, can be continued (%s)", member.name, progress)
    else:
        log = folder / member.name / LOG
        logger.warning("%s: failed with exit code %d, log %s: %s", member.name, code, log, last_error(log))


def last_error(log: Path) -> str:
    """Return the last line ``ERROR[…] …`` of a member's log; empty if there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = re.findall(r"^ERROR\[.*$", file.read().decode(errors="replace"), re.MULTILINE)
        return lines[-1] if lines else ""
    return ""

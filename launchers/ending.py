"""End a command of several ranks: an exception is one line on stderr, a traceback in a file and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.crash import write_crash_file
from launchers.relaunch import resume_command
from launchers.verdict import EXIT_DIR
from pipeline.command_line import error_line, missing_package, require_output, stop_line
from pipeline.config.schema import Config
from pipeline.distributed.rank_variables import SETS_RANK, LauncherError, launcher, rank_here
from pipeline.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    PeerError,
    PermissionDenied,
    Preempted,
    RunError,
    WriteError,
    session_end_of,
)
from pipeline.files import cannot_write
from pipeline.redaction import redact
from pipeline.terminal.live import is_terminal, line
from pipeline.terminal.streams import guard_output, lost_output

# Before the ranks are connected, these have the same cause on every rank of a node, and the first rank reports it.
SAME_ON_A_NODE = (ConfigError, DataError, WriteError, PermissionDenied, IntegrityError)

# Warnings that nobody who runs a command can do anything about: text of a Python warning, name of a logger.
HARMLESS_WARNINGS = (r"barrier\(\): using the device under current context",)  # torch, with NCCL: the device is right
HARMLESS_LOGGERS = ("matplotlib.font_manager",)  # builds its cache once on a machine


class _Formatter(logging.Formatter):
    """Formats ``HH:MM:SS text`` and ``HH:MM:SS warning: text``, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        record.severity = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return redact(super().format(record))


def log_to_terminal() -> None:
    """Log to stdout: INFO and above from rank 0, warnings and above from the others, above the live line.

    Python's warnings become log lines of rank 0; they are the same on the others.
    """
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.WARNING
    if rank == "0":
        line.open(sys.stdout)
    else:
        line.is_of_another = is_terminal(sys.stdout)
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(severity)s%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("launchers", "pipeline"):
        logging.getLogger(package).setLevel(level)
    for text in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in HARMLESS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = _one_line
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if rank == "0" else logging.ERROR)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning of Python on one line, in place of ``warnings.formatwarning``."""
    return f"{' '.join(str(message).split())} ({category.__name__} at {'/'.join(Path(filename).parts[-3:])}:{lineno})"


@dataclasses.dataclass
class _End:
    code: int = 0
    output_dir: Path | None = None
    config: Config | None = None
    resumes: Sequence[str] | None = None  # the arguments, if --resume auto can resume the command
    is_output_a_log: bool = False  # whether what counts is in files, so that the command succeeds without its output


@contextlib.contextmanager
def ending() -> Iterator[_End]:
    """Turn every exception in the block into one line on stderr, a traceback in a file and an exit code."""
    guard_output()
    end = _End()
    try:
        yield end
        line.close()
        if not end.is_output_a_log:
            require_output()
        elif rank_here()[0] == "0" and (lost := lost_output()):
            _print(f"warning: lines of the log are missing: {lost.strerror or lost}; the files of the run are complete")
    except KeyboardInterrupt:
        end.code = 130
        line.close()
    except Exception as error:
        line.close()
        known = _known(error)
        end.code = known.code
        (rank, local_rank), ended = rank_here(), session_end_of(error)
        step = None if ended is None else ended.step
        # for an error that a user caused before the first step the line says everything
        needs_file = not isinstance(known, Preempted) and (step is not None or not isinstance(error, RunError))
        crash_file = (
            write_crash_file(error, output_dir=end.output_dir, config=end.config, rank=rank, step=step)
            if needs_file
            else ""
        )
        if _is_reported_before_session(known, local_rank) if ended is None else ended.is_reported_elsewhere:
            time.sleep(_linger_seconds(known))
        elif isinstance(known, Preempted) and end.resumes is not None:
            _print(stop_line(known.code, known.what, command=resume_command(end.resumes), rank=rank, step=step))
        else:
            _print(error_line(known.code, known.what, do=known.do, rank=rank, step=step, crash_file=crash_file))
    if end.code and os.environ.get(EXIT_DIR):
        with contextlib.suppress(OSError):
            Path(os.environ[EXIT_DIR], f"rank-{rank_here()[0]}").write_text(str(end.code))


def _linger_seconds(error: RunError) -> float:
    """Return how long a rank that another one speaks for waits before it ends.

    A launcher kills the other ranks once one has ended, and the reporting one needs time for its line. A rank
    that lost a peer has already listened for the cause, and must end within the time-out plus five seconds.
    """
    if not launcher():
        return 0.0
    return 0.5 if isinstance(error, PeerError) else 2.0


def _print(line: str) -> None:
    """Print a line on stderr, between empty lines under a launcher that surrounds it with its own output."""
    around = "\n" if launcher() in SETS_RANK.values() else ""
    print(f"{around}{line}{around}", file=sys.stderr, flush=True)


def _is_reported_before_session(error: RunError, local_rank: str) -> bool:
    """Return whether another rank reports an error that was raised before the ranks were connected."""
    is_same = isinstance(error, SAME_ON_A_NODE) and not isinstance(error, LauncherError)
    return error.is_reported_elsewhere or (is_same and local_rank not in ("0", "?"))


def _known(error: Exception) -> RunError:
    """Return ``error`` as one of the project's own errors."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError) and error.filename:
        return cannot_write(Path(str(error.filename)), error)
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        return ConfigError(
            f"the GPU has too little free memory: {first_line}",
            do="raise train.accumulation (on a resume with --allow-change train.accumulation), use more GPUs or "
            "train.precision=bf16, and look in nvidia-smi whether another process holds memory",
        )
    return RunError(f"unexpected {type(error).__name__}: {first_line}", do="report this with the traceback")

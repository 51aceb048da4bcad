"""Find out which command resumes the run of this process. Standard library only."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.distributed.rank_variables import launcher
from pipeline.redaction import redact

MAX_ANCESTORS = 8
PER_NODE = "deepspeed.launcher.launch"  # deepspeed starts this on each node; users do not call it


def resume_command(arguments: Sequence[str]) -> str:
    """Return the shell command that resumes this run: this program, ``arguments`` and ``--resume auto``.

    The command starts like the outermost process whose command line ends with ``arguments``: the
    launcher as it was called on this node. If none is found, ``…`` stands for the options of the
    launcher.
    """
    own = [text for text in arguments if not text.startswith("--local_rank")]  # the deepspeed launcher adds it
    callers = [line[: -len(own)] for line in _command_lines() if own and line[-len(own) :] == own]
    callers = [head for head in callers if PER_NODE not in head]
    head = shlex.join(_without_interpreter(callers[-1])) if callers else ""
    if not callers or (callers[-1] == callers[0] and launcher()):
        head = f"{launcher()} … {sys.argv[0]}" if launcher() else f"python {sys.argv[0]}"
    return redact(f"{head} {shlex.join([*_without_resume(own), '--resume', 'auto'])}")


def _command_lines() -> Iterator[list[str]]:
    """Yield the command lines of this process, its parent and so on, without ``--local_rank``."""
    process = os.getpid()
    for _ in range(MAX_ANCESTORS):
        try:
            texts = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:  # the process has ended, or belongs to another container
            return
        yield [text for text in texts if not text.startswith("--local_rank")]
        process = int(status.rpartition(")")[2].split()[1])


def _without_resume(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for previous, text in zip(["", *arguments], arguments, strict=False):
        if text != "--resume" and previous != "--resume" and not text.startswith("--resume="):
            kept.append(text)
    return kept


def _without_interpreter(head: Sequence[str]) -> list[str]:
    """Remove the interpreter of an installed script, such as torchrun, which is called without it."""
    is_script = len(head) > 2 and head[1].startswith("/") and not head[1].endswith(".py")
    return list(head[1:] if is_script and Path(head[0]).name.startswith("python") else head)

"""The ranks of one node in one round: started by torchrun in a child process, stopped, and their exit code.

Standard library only in the supervisor's process; torch is imported by the child.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from launchers.verdict import EXIT_DIR, agreed_code
from pipeline import errors
from pipeline.command_line import report
from pipeline.distributed.rank_variables import require_resolvable

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A rank that has lost a peer cannot save any more; it listens three seconds for the cause and says it.
LOST_PEER_SECONDS = 10.0
TORCHRUN_SECONDS = 2.0  # it takes to end after its ranks
PR_SET_PDEATHSIG = 1  # of prctl(2)


class NodeRanks:
    """The ranks of this node, from their start on.

    Args:
        options: those of ``launchers.run``.
        port: of node 0, where torchrun keeps the store of the ranks.
    """

    def __init__(self, options: argparse.Namespace, port: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ticketworks-exit-")
        names = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "shutdown_timeout")
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
        arguments += [f"--master-port={port}", f"--signals-to-handle={','.join(one.name for one in FORWARDED)}"]
        code = "import sys; from launchers.node_ranks import torchrun; torchrun(sys.argv[1:])"
        # In a session of its own, so that a Ctrl-C in the terminal reaches the ranks once, through the handler.
        self._child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code, str(os.getpid()), *arguments, *options.command],
            {**os.environ, EXIT_DIR: self._folder.name},
            setsid=True,
        )
        self._pids: list[int] = []
        self._kill_at: float | None = None

    def send(self, number: int) -> None:
        """Send a signal to torchrun, which passes it on to the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def stop(self) -> None:
        """Stop the ranks, which have lost a peer: SIGTERM now, SIGKILL after LOST_PEER_SECONDS."""
        if self._kill_at is None:
            self.send(signal.SIGTERM)
            self._kill_at = time.monotonic() + LOST_PEER_SECONDS

    def poll(self) -> int | None:
        """Return the most informative exit code of the ranks once all have ended; None until then."""
        self._pids = _children_of(self._child) or self._pids
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._kill_ranks()
            if time.monotonic() > self._kill_at + TORCHRUN_SECONDS:  # it hears no signal while it waits for a node
                self.send(signal.SIGKILL)
        while True:  # as PID 1 of a container this process is also handed orphans, which it must reap
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return None
            if process == self._child:
                break
        own = os.waitstatus_to_exitcode(status)
        if own < 0:
            self._kill_ranks()  # torchrun was killed and could not stop them
        texts = [path.read_text() for path in sorted(Path(self._folder.name).glob("rank-*"))]
        self._folder.cleanup()
        return agreed_code(own, [int(text) for text in texts if text.isdigit()])

    def _kill_ranks(self) -> None:
        for process in self._pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)  # torchrun gives each rank a session of its own


def _children_of(process: int) -> list[int]:
    """Return the child processes of a process; nothing where the kernel does not list them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            found += [int(text) for text in path.read_text().split()]
    return found


def torchrun(argv: list[str]) -> None:
    """Run torchrun in the child process; the first argument is the process that has started it.

    Also write the exit codes of ranks that could not write their own: 76 for a rank killed by a signal.
    """
    _die_with(int(argv.pop(0)))
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    address = next(text.partition("=")[2] for text in argv if text.startswith("--master-addr="))
    try:
        require_resolvable(address, f"--master-addr {address!r}")
        run.main(argv)
    except errors.RunError as error:
        sys.exit(report(error))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            with contextlib.suppress(OSError), Path(os.environ[EXIT_DIR], f"rank-{rank}").open("x") as file:
                file.write(str(failure.exitcode if failure.exitcode > 0 else errors.PeerError.code))
        sys.exit(1)
    except SignalException:  # stopped by a signal: used only if no rank has written a code
        sys.exit(errors.PeerError.code)
    except DistError as error:
        sys.exit(
            report(
                errors.PeerError(f"launchers.run: the nodes could not rendezvous: {error}", do="start every node again")
            )
        )


def _die_with(parent: int) -> None:
    """Let this process be stopped with SIGTERM when its parent dies, however that happens; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died before
            sys.exit(errors.PeerError.code)

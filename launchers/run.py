"""Supervisor for clusters: starts torchrun, forwards signals, and exits with the code that the ranks agreed on.

    python -m launchers.run --nnodes 4 --nproc-per-node 8 --master-addr train-0.train --
    launchers/train.py --config NAME

As a task of srun, one on each node, it takes the number of nodes and their meeting point from Slurm.

torchrun turns every exit code of a rank into 1, but a scheduler must know whether to try again. So each rank that fails
writes its code to ``$TICKETWORKS_EXIT_DIR/rank-<RANK>``, and the most informative one becomes the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launchers.start import require_environment
from pipeline import errors
from pipeline.command_line import ArgumentParser, add_version, report, run_to_end, whole_number
from pipeline.distributed.gpus import num_gpus
from pipeline.distributed.rank_variables import meeting_point, place_by_launcher, require_resolvable

EXIT_DIR = "TICKETWORKS_EXIT_DIR"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PRIORITY = (  # the first of these that any rank has is the cause; a lost peer (76) is never a cause
    *(errors.IntegrityError.code, errors.NumericsError.code, errors.Preempted.code),
    *(
        errors.ConfigError.code,
        errors.DataError.code,
        errors.WriteError.code,
        errors.PermissionDenied.code,
        errors.ServiceError.code,
    ),
    errors.RunError.code,
    errors.PeerError.code,
)


def parse(argv: Sequence[str], parser: ArgumentParser | None = None) -> argparse.Namespace:
    """Parse the options before the first ``--``; ``command`` is the script and its arguments after it.

    Args:
        argv: the command line.
        parser: that of another command with the same options, which are added to its own.

    Raises:
        ConfigError: the command line is invalid.
    """
    parser = parser or ArgumentParser(
        prog="python -m launchers.run",
        usage="%(prog)s [options] -- SCRIPT ARGS…",
        description="Start SCRIPT on this node, one process per rank. Forward signals to the ranks, and exit with 0 if "
        "all succeed, else with the exit code of a rank that failed by itself rather than because another one did.",
        allow_abbrev=False,
    )
    add_version(parser)
    parser.add_argument(
        "--nnodes",
        type=whole_number(1),
        metavar="N",
        help="number of nodes; run this command on each of them (default: the number of tasks of srun or mpirun, or 1)",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=whole_number(1),
        default=num_gpus() or 1,
        metavar="N",
        help="number of ranks on this node (default: one per GPU, or 1 without a GPU)",
    )
    help_address = (
        "host name or IP address of node 0; required with more than one node, except under srun (default: 127.0.0.1)"
    )
    parser.add_argument("--master-addr", metavar="HOST", help=help_address)
    parser.add_argument(
        "--master-port",
        type=whole_number(1, 65535),
        metavar="PORT",
        help="port of node 0 on which the ranks meet (default: 29500, under srun one for each step; with one node, any "
        "free port)",
    )
    parser.add_argument(
        "--node-rank",
        type=whole_number(0),
        metavar="N",
        help="number of this node, counted from 0 (default: $JOB_COMPLETION_INDEX, $SLURM_NODEID, or 0)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=whole_number(0),
        default=30,
        metavar="SECONDS",
        help="time for the ranks to stop after a signal before they are killed, in seconds (default: 30)",
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.command = list(argv[split + 1 :])
    if not options.command:
        parser.error("expected a script after --")
    _complete_nodes(options, parser)
    if options.node_rank >= options.nnodes:
        parser.error(f"--node-rank {options.node_rank} is out of range for --nnodes {options.nnodes}")
    if options.nnodes > 1 and not options.master_addr:
        parser.error("more than one node needs --master-addr, the host of node 0")
    options.master_addr = options.master_addr or "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as probe:  # on one node any free port will do
        options.master_port = options.master_port or (29500 if options.nnodes > 1 else probe.getsockname()[1])
    return options


def _complete_nodes(options: argparse.Namespace, parser: ArgumentParser) -> None:
    """Complete the options about nodes by what the scheduler says, which starts this command once on each node.

    Raises:
        ConfigError: it has started several on this node.
    """
    index = os.environ.get("JOB_COMPLETION_INDEX")  # of Kubernetes
    is_missing = options.nnodes is None or (options.nnodes > 1 and not options.master_addr)
    place = place_by_launcher() if is_missing and not index else None
    if place is not None and options.nnodes in (None, place.world_size):
        if place.local_world_size > 1:
            raise errors.ConfigError(
                f"launchers.run: {place.launcher.command} has started {place.local_world_size} tasks on this node, "
                "expected one, which starts all ranks of the node",
                do="start one task on each node (srun --ntasks-per-node 1), or the script itself without "
                "launchers.run; --nnodes 1 starts a run of its own in each task",
            )
        options.nnodes, index = place.world_size, str(place.rank)
        if not options.master_addr:
            options.master_addr, port = meeting_point(os.environ, place)
            options.master_port = options.master_port or int(port)
    options.nnodes = options.nnodes or 1
    if options.node_rank is None:
        index = index or (os.environ.get("SLURM_NODEID") if options.nnodes > 1 else None) or "0"
        try:
            options.node_rank = whole_number(0)(index)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --node-rank: {error}")


def torchrun(argv: list[str]) -> None:
    """Run torchrun in the child process.

    Also write the exit codes of ranks that could not write their own: 76 for a rank killed by a signal.
    """
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
            with contextlib.suppress(FileExistsError), Path(os.environ[EXIT_DIR], f"rank-{rank}").open("x") as file:
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


def agreed_code(own: int, codes: Sequence[int]) -> int:
    """Return the exit code of this node.

    Args:
        own: exit code of torchrun; negative if a signal killed it.
        codes: exit codes that the ranks have written.
    """
    if own == 0:
        return 0
    ranked = [code for code in PRIORITY if code in codes]
    return [*ranked, *codes, own if own > 0 else errors.PeerError.code][0]


def main() -> int:
    """Run the script under torchrun and return the most informative exit code of its ranks."""
    require_environment()
    return run_to_end(lambda: _supervise(parse(sys.argv[1:])))


def _supervise(options: argparse.Namespace) -> int:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name != "command"]
    arguments += ["--signals-to-handle=" + ",".join(number.name for number in FORWARDED), *options.command]
    child_command = [
        sys.executable,
        "-c",
        "import sys; from launchers.run import torchrun; torchrun(sys.argv[1:])",
        *arguments,
    ]
    with tempfile.TemporaryDirectory(prefix="ticketworks-exit-") as folder:
        # In a session of its own, so that a Ctrl-C in the terminal reaches the ranks once, through the handler.
        child = os.posix_spawn(sys.executable, child_command, {**os.environ, EXIT_DIR: folder}, setsid=True)

        def forward(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number in FORWARDED:
            signal.signal(number, forward)
        while (ended := os.wait())[
            0
        ] != child:  # as PID 1 of a container this process is also handed orphans, which it must reap
            pass
        texts = [path.read_text() for path in sorted(Path(folder).glob("rank-*"))]
    return agreed_code(os.waitstatus_to_exitcode(ended[1]), [int(text) for text in texts if text.isdigit()])


if __name__ == "__main__":
    sys.exit(main())

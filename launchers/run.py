"""Supervisor for clusters: starts the ranks, forwards signals, and exits with the code that the ranks agreed on.

    python -m launchers.run --nnodes 4 --nproc-per-node 8 --master-addr train-0.train --
    launchers/train.py --config NAME

As a task of srun, one on each node, it takes the number of nodes and their meeting point from Slurm.

torchrun turns every exit code of a rank into 1, but a scheduler must know whether to try again. So each rank that fails
writes its code to ``$TICKETWORKS_EXIT_DIR/rank-<RANK>``, and the most informative one becomes the exit code.

Where the command resumes (``--resume auto``), ranks that have failed or lost a node are started again in place, and
continue from the newest checkpoint: ``launchers.meeting`` (who is here), ``launchers.verdict`` (what follows).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from launchers.meeting import Alone, Meeting, say
from launchers.node_ranks import FORWARDED, NodeRanks
from launchers.start import require_environment
from launchers.verdict import Result
from pipeline.command_line import ArgumentParser, add_version, run_to_end, whole_number
from pipeline.distributed.gpus import num_gpus
from pipeline.distributed.rank_variables import meeting_point, place_by_launcher
from pipeline.errors import ConfigError, Preempted, RunError, ServiceError

POLL_SECONDS = 0.1
RESUMING = ("--resume auto", "--resume=auto")  # in a command that continues where an earlier one has ended
RESTARTS = 3


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
        help="port of node 0 on which the nodes meet (default: 29500, under srun one for each step; with one node, any "
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
    parser.add_argument(
        "--restarts",
        type=whole_number(0),
        metavar="N",
        help="number of times within a day that ranks are started again in place after a failure of their own; a lost "
        f"node is waited for and not counted; 0: the first failure ends the run (default: {RESTARTS} if the command "
        "has --resume auto, else 0)",
    )
    parser.add_argument(
        "--wait",
        type=whole_number(1),
        default=900,
        metavar="SECONDS",
        help="time to wait for nodes that are missing, in seconds (default: 900)",
    )
    parser.add_argument(
        "--peer-timeout",
        type=whole_number(2),
        default=30,
        metavar="SECONDS",
        help="time without a sign of life after which a node counts as lost, in seconds (default: 30)",
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.command = list(argv[split + 1 :])
    if not options.command:
        parser.error("expected a script after --")
    if options.restarts is None:
        options.restarts = RESTARTS if any(text in " ".join(options.command) for text in RESUMING) else 0
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
            raise ConfigError(
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


def main() -> int:
    """Run the script under torchrun and return the most informative exit code of its ranks."""
    require_environment()
    return run_to_end(lambda: _supervise(parse(sys.argv[1:])))


def _supervise(options: argparse.Namespace) -> int:
    signals: list[int] = []
    ranks: NodeRanks | None = None

    def forward(number: int, frame: object) -> None:
        signals.append(number)
        if ranks is not None:
            ranks.send(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    with closing(Meeting(options) if options.nnodes > 1 else Alone(options)) as meeting:
        while True:
            port = meeting.gather(lambda: bool(signals))
            if port is None:  # stopped between two rounds, when everything is saved
                return Preempted.code
            ranks = NodeRanks(options, port)
            if signals:  # since the nodes have met
                ranks.send(signals[-1])
            code = _until_ended(ranks, meeting, is_asked_to_stop=lambda: bool(signals))
            ranks = None
            is_leaving = bool(signals) or code == ServiceError.code
            verdict = meeting.report(Result(code, is_leaving), lambda: bool(signals))
            if is_leaving or verdict.code is not None:
                if verdict.why:
                    say(options.node_rank, verdict.why)
                return code if is_leaving else int(verdict.code or 0)
            say(options.node_rank, f"{verdict.why}; the ranks start again in place")


def _until_ended(ranks: NodeRanks, meeting: Meeting | Alone, *, is_asked_to_stop: Callable[[], bool]) -> int:
    """Wait until the ranks have ended, and stop them if others must; return their exit code."""
    try:
        while (code := ranks.poll()) is None:
            if meeting.must_stop() and not is_asked_to_stop():  # it also tells the others that this node lives
                ranks.stop()
            time.sleep(POLL_SECONDS)
    except RunError:  # another process has taken this node's place
        ranks.stop()
        while ranks.poll() is None:
            time.sleep(POLL_SECONDS)
        raise
    return code


if __name__ == "__main__":
    sys.exit(main())

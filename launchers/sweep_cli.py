"""Command line of a sweep: checks the configuration of every member before anything starts."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launchers.ending import log_to_terminal
from launchers.environment import check_environment, require_one_process
from launchers.sweep_jobs import HowToRun
from launchers.sweep_members import (
    PARENT,
    Member,
    axes_of,
    chosen,
    find_combination,
    load_record,
    members_of,
    opened_record,
    require_free,
)
from launchers.sweep_table import FORMATS, NETWORKS, Table, collect, render
from launchers.train_cli import check
from pipeline.command_line import ArgumentParser, add_version, local_path, report, run_to_end, stop_line, whole_number
from pipeline.config.load import load_config
from pipeline.errors import ConfigError, Preempted, RunError, WriteError
from pipeline.files import at_work_in, require_writable
from pipeline.numbers import quantity
from pipeline.redaction import redact
from pipeline.tracking.place import check_tracking
from pipeline.training import run_record

logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1
MAX_MEMBERS = 10_000
_EXPECTED_SEEDS = (
    "is not a list of seeds; expected N, A-B with A <= B, or A,B,…, "
    f"with 1 to {MAX_MEMBERS} different seeds of at most {MAX_SEED}"
)
ONCE = "start it with plain python, or srun --ntasks 1 (--jobs: several runs at once, --ranks: several ranks each)"
MAX_NAMED = 3  # failed runs in the error line
EXAMPLES = """\
examples:
  python launchers/sweep.py --config fashion_mnist_s90 --set sparsity.method=set,rigl_itop \\
      --set sparsity.density=0.05,0.1 --seeds 3 --output runs/methods       12 runs, one after the other
  … --jobs 4 --nice 19                                 four at once, at the lowest priority
  … --ranks 8                                          each with 8 ranks on this node
  … --seeds 8-15                                       seeds 8 to 15; or a list such as 3,5,8
  python launchers/sweep.py --config fashion_mnist_s90 --seeds 3 --output runs/variants \
      --variant 'dense: sparsity.method=dense, sparsity.density=1, plan.timetable=dense' --variant 'rigl_itop:'
                                                       settings that go together, as one more axis
  … --dry-run                                          print what would be run, and the commands
  … --array                                            start nothing; print the command of a Slurm array that does
  python launchers/sweep.py --table --output runs/methods                   the table of what is done so far
  python launchers/sweep.py --table --output runs/methods --baseline method=set,density=0.1 --format csv
  … --table --baseline variant=dense --against 'last ticket'     e.g. ensembles against the dense network
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of launchers/sweep.py."""
    parser = ArgumentParser(
        prog="launchers/sweep.py",
        allow_abbrev=False,
        description="Train every combination of settings with several seeds, and compare them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add("--config", metavar="NAME", help="YAML file, or the name of one in configs/")
    add(
        "--output",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder of the sweep; every run gets a subfolder",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE…",
        help="values of a key, each of which is tried; may be repeated, and all combinations are run",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: KEY=VALUE, …'",
        help="settings that are tried together; may be repeated, and each variant is combined with the values of --set",
    )
    add(
        "--seeds",
        type=_seeds,
        default=[0],
        metavar="N|A-B|A,B,…",
        help="N: seeds 0 to N-1; A-B or A,B,…: these seeds; every combination is run with each (default: 1)",
    )
    add(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUE,…",
        help="run only these combinations now, such as method=set,seed=0; AXIS is "
        "variant, seed, or the last part of a --set key; may be repeated",
    )
    add(
        "--jobs",
        type=whole_number(1, 4096),
        default=1,
        metavar="N",
        help="number of runs to train at the same time (default: 1)",
    )
    add(
        "--ranks",
        type=whole_number(1, 4096),
        default=1,
        metavar="N",
        help="number of ranks per run, on this node; more than one rank is started with python -m launchers.run "
        "(default: 1)",
    )
    add(
        "--threads",
        type=whole_number(1, 1024),
        default=0,
        metavar="N",
        help="CPU threads of each rank (default: as configured; with --jobs an equal share of the CPUs)",
    )
    add("--nice", type=whole_number(0, 19), default=0, metavar="N", help="lower the priority by N, at most 19")
    add("--dry-run", action="store_true", help="print what would be run, and exit; nothing is written")
    add(
        "--array",
        action="store_true",
        help="start nothing: set up the sweep for the tasks of a Slurm array, print the table of what is done and the "
        "sbatch command for the rest",
    )
    add(
        "--member",
        type=whole_number(0, MAX_MEMBERS - 1),
        metavar="N",
        help="become run N of the sweep, counted from 0, after --array: what a task of the array does",
    )
    add("--table", action="store_true", help="print the table of the runs that are done, and exit")
    add(
        "--baseline",
        default="",
        metavar="AXIS=VALUE,…",
        help="combination that the others are compared with; AXIS as for --only (default: the first)",
    )
    add(
        "--against",
        choices=tuple(NETWORKS),
        default="",
        help="network of the baseline with which every network is compared: its last ticket, its superposition (all "
        "tickets merged into one network) or its largest ensemble (default: compare each network with its counterpart "
        "in the baseline)",
    )
    add("--format", choices=tuple(FORMATS), default="text", help="format of the printed table (default: text)")
    add("overrides", nargs="*", metavar="key=value", help="setting of the configuration, for all runs")
    given = parser.parse_intermixed_args(list(argv))
    if not given.table and not given.config:
        parser.error("the following arguments are required: --config")
    return given


def _seeds(text: str) -> list[int]:
    """Read a number of seeds, a range ``8-15``, or a list ``3,5,8``."""
    match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19})|((?:,\d{1,19})*,?))", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' {_EXPECTED_SEEDS}")
    if match[2]:
        seeds: Sequence[int] = range(int(match[1]), int(match[2]) + 1)
    elif match[3]:
        seeds = [int(part) for part in text.split(",") if part]
    else:
        seeds = range(int(text))
    if not 0 < len(seeds) <= MAX_MEMBERS or max(seeds) > MAX_SEED or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"'{text}' {_EXPECTED_SEEDS}")
    return list(seeds)


def main(sweep: Callable[..., Any], argv: Sequence[str]) -> int:
    """Parse, check and call ``sweep(members, folder, how, …)``; return the exit code."""
    return run_to_end(lambda: _run(sweep, argv))


def _run(sweep: Callable[..., Any], argv: Sequence[str]) -> int:
    given = parse(argv)
    if given.member is not None:
        _become_member(given)
        return 0
    check_environment()
    if given.table:
        return _print_existing(given)
    require_one_process("sweeps", ONCE)
    members = _members(given)
    find_combination(given.baseline, (member.combination for member in members))
    to_run = chosen(members, given.only)
    _check_output(given.output)
    how = HowToRun(given.config, num_jobs=given.jobs, num_ranks=given.ranks, num_threads=given.threads)
    if given.dry_run:
        _print_dry_run(members, to_run, given.output, how)
        return 0
    opened_record(given.output, members)  # refuses what holds something else, before anything is written there
    check_tracking(members[0].config.tracking, given.output / PARENT)
    log_to_terminal()
    os.nice(given.nice)
    try:
        table = sweep(
            members,
            given.output,
            None if given.array else how,
            only=given.only,
            baseline=given.baseline,
            against=given.against,
        )
    except Preempted as error:
        command = redact(f"python {shlex.quote(sys.argv[0])} {shlex.join(argv)}")
        print(stop_line(error.code, error.what, command=command), file=sys.stderr, flush=True)
        return error.code
    code = _print_table(table, given)
    if given.array:
        _print_array(members, to_run, given.output, [text for text in argv if text != "--array"])
    return code


def _become_member(given: argparse.Namespace) -> NoReturn:
    """Replace this process by the one that trains a member, which gets its signals and gives its exit code."""
    members = _all_members(given)
    if given.member >= len(members):
        raise ConfigError(
            f"--member {given.member}: the sweep has {quantity(len(members), 'run')}, counted from 0",
            do="submit the array that --array prints",
        )
    if load_record(given.output) is None:
        raise ConfigError(f"{given.output}: holds no sweep", do="run the same command with --array first")
    member, record = members[given.member], opened_record(given.output, members)
    if record.is_done(member.name):
        print(f"{member.name}: is done", flush=True)
        sys.exit(0)
    how = HowToRun(given.config, num_ranks=given.ranks, num_threads=given.threads)
    os.nice(given.nice)
    command = how.command(member)
    print(f"{member.name}: {redact(shlex.join(command))}", flush=True)
    os.execve(command[0], command, how.environment(0, parent_run=record.tracker_run))


def _print_array(members: Sequence[Member], to_run: Sequence[Member], folder: Path, argv: Sequence[str]) -> None:
    """Print the command of the array that trains what is not done."""
    record = opened_record(folder, members)
    chosen_names = {member.name for member in to_run}
    missing = [
        number
        for number, member in enumerate(members)
        if member.name in chosen_names and not record.is_done(member.name)
    ]
    if missing:
        arguments = redact(shlex.join(argv))
        print(f"\nsbatch --array={ranges(missing)} launchers/slurm.sbatch {arguments}", flush=True)


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as Slurm reads them: ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _members(given: argparse.Namespace) -> list[Member]:
    """Return all members, after checking the configuration, plan and network of every combination."""
    members = _all_members(given)
    for member in members:
        if member.seed == given.seeds[0]:
            try:
                check(member.config)
            except RunError as error:
                raise type(error)(f"{member.name}: {error.what}", do=error.do) from None
    return members


def _all_members(given: argparse.Namespace) -> list[Member]:
    """Return all members, in the order in which ``--member`` counts them."""
    for setting in given.overrides:
        require_free(setting)
    axes = axes_of(given.set, given.variant)
    num_members = len(given.seeds)
    for axis in axes:
        num_members *= len(axis.values)
    if num_members > MAX_MEMBERS:
        raise ConfigError(f"--set, --seeds: {num_members} runs, expected at most {MAX_MEMBERS}", do="sweep over fewer")
    load = functools.partial(load_config, given.config)
    return members_of(axes, given.seeds, settings=given.overrides, folder=given.output, load=load)


def _check_output(folder: Path) -> None:
    require_writable(folder, setting="--output")
    if who := at_work_in(folder):
        raise WriteError(
            f"{folder}: a sweep is running here: {who}", do="wait for it to end, or choose another --output"
        )


def _print_dry_run(members: Sequence[Member], to_run: Sequence[Member], folder: Path, how: HowToRun) -> None:
    record = opened_record(folder, members)
    num_combinations, num_threads = len({member.combination for member in members}), how.threads_of(members[0])
    product = f"{quantity(num_combinations, 'combination')} × {quantity(len(members) // num_combinations, 'seed')}"
    threads = quantity(num_threads, "thread") if num_threads else "all threads"
    print(
        f"{product} = {quantity(len(members), 'run')} in {folder}, {how.num_jobs} at once, "
        f"each with {quantity(how.num_ranks, 'rank')} of {threads}"
    )
    for member in to_run:
        own = folder / member.name
        state = "done" if record.is_done(member.name) else "continue" if run_record.is_occupied(own) else "start"
        state = "running" if at_work_in(own) else state
        print(f"{state:9} {member.name}")
        if state in ("continue", "start"):
            print(f"          {redact(shlex.join(how.command(member)))}")


def _print_existing(given: argparse.Namespace) -> int:
    record = load_record(given.output)
    if record is None:
        raise ConfigError(f"{given.output}: holds no sweep", do="pass the --output of a sweep")
    return _print_table(collect(record, baseline=given.baseline, against=given.against), given)


def _print_table(table: Table, given: argparse.Namespace) -> int:
    print(render(table, given.format), end="")
    if not table.failed:
        return 0
    failed = ", ".join(f"{name} ({why})" for name, why in list(table.failed.items())[:MAX_NAMED])
    more = f" and {len(table.failed) - MAX_NAMED} more, named above" if len(table.failed) > MAX_NAMED else ""
    return report(
        RunError(
            f"{quantity(len(table.failed), 'run')} failed: {failed}{more}",
            do="correct the cause and start the sweep again: it keeps what is done",
        )
    )

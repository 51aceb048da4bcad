"""Stop runs anywhere and resume them: ``python -m tests.campaigns.resume``.

A resumed run must end with the same bits as an uninterrupted one. Small networks on FFCV files are
stopped in the middle of epochs, with SET, RigL, GraNet, EDST and Sup-tickets, ZeRO stages 0 and 1:

* ``--points``: stops at random steps, in one process, with several stops per run; each checkpoint
  has the same bytes as in the uninterrupted run.
* ``--kills``: SIGKILL to one or both of two ranks, right before every file operation of a save and
  of a ticket, in steps, updates and evaluations, and at random moments; then ``--resume auto``. The
  runs that are killed are evaluated every 7 steps, the uninterrupted ones only at the end.
* ``--stops``: SIGTERM to one or both of two ranks, and the time until both have ended with
  everything saved.
* ``--regrouped``: 4 -> 2 -> 1 -> 4 ranks: the same samples, the same masks at each resume, and
  accuracy within noise.

Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.regrouped import regrouped
from tests.campaigns.small_runs import (
    CASES,
    EVERY,
    STEPS,
    arguments,
    checkpoint_at,
    differs,
    log_of,
    outcome_of,
    require_codes,
    upper_bound,
)
from tests.end_to_end.small_job import make_data
from tests.support.ranks import RankServer, reuse_loaders, without_figures

# -- stops in one process

ALONE = ["train.threads_per_rank=1"]


@dataclass
class _Stop:
    """A request to stop at a step, as if by a signal."""

    at: int | None = None

    def install(self) -> None:
        from pipeline.distributed.session import Session

        agree = Session.agree_to_go_on

        def agree_and_stop(session: Session, loss: Any, gradient_norm: Any, step: int, **settings: Any) -> bool:
            session.is_stop_requested = step + 1 == self.at
            return agree(session, loss, gradient_norm, step, **settings)

        Session.agree_to_go_on = agree_and_stop  # type: ignore[method-assign]


def stop_points(
    data: Path, folder: Path, *, points: int, stops_per_run: int, seed: int, cases: Sequence[str]
) -> tuple[int, int]:
    """Test random stop points; returns (number that differ, number of all)."""
    stop, choose = _Stop(), random.Random(seed)
    stop.install()
    wrong = done = 0
    while done < points:
        for case in cases:
            whole = folder / "whole" / case
            if not whole.exists():
                _train(arguments(data, whole, "checkpoint.keep=1000", *ALONE, *CASES[case], every=1))
            output = folder / "stopped"
            shutil.rmtree(output, ignore_errors=True)
            num_stops = min(stops_per_run, points - done)
            steps = sorted(choose.sample(range(1, STEPS), num_stops))
            for step in [*steps, None]:
                stop.at = step
                _train(arguments(data, output, *ALONE, *CASES[case], resume="auto", every=1000))
                if step is not None:
                    done += 1
                    wrong += differs(
                        f"{case}, stopped after step {step}", checkpoint_at(whole, step), checkpoint_at(output, step)
                    )
            wrong += differs(f"{case}, the end", outcome_of(whole), outcome_of(output))
            if done >= points:
                break
    return wrong, done


def in_this_fork(*, rank: int, data: str, folder: str, points: int, case: str) -> None:
    """Test random stop points instead of training, for ``RankServer.start(inject=…)``.

    Exits with 1 if one differs.
    """
    from pipeline.command_line import leave

    wrong, done = stop_points(Path(data), Path(folder), points=points, stops_per_run=points, seed=0, cases=[case])
    print(f"{done - wrong}/{done} identical")
    leave(int(wrong > 0))


def _train(argv: Sequence[str]) -> None:
    """Run launchers/train.py in this process, to the end or to the requested stop."""
    from launchers.train import train
    from launchers.train_cli import parse
    from pipeline.config.load import load_config
    from pipeline.datasets.sets import open_data_sets
    from pipeline.errors import Preempted
    from pipeline.plan import build_plan

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name, None)
    _forget_groups()
    given = parse(argv)
    config = load_config(given.config, given.overrides)
    with contextlib.suppress(Preempted), contextlib.redirect_stdout(io.StringIO()):
        plan = build_plan(config, steps_per_epoch=2000 // config.train.global_batch)
        train(config, plan, sets=open_data_sets(config), resume=given.resume)


def _forget_groups() -> None:
    """Make DeepSpeed forget the process groups of the last run in this process, which are gone."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and name.isupper() and not isinstance(value, str):
            setattr(groups, name, {} if isinstance(value, dict) else None)


# -- kills of two ranks

MOMENTS = {
    "in a step": ("pipeline.engine.torch_engine:cross_entropy", 17),
    "in an optimiser step": ("torch.optim:SGD.step", 13),
    "in an update": ("pipeline.sparse.update:prune_and_regrow", 3),
    "between update and check": ("pipeline.sparse.sparsifier:explore", 2),
    "while a ticket is taken": ("pipeline.training.selection:ticket_of", 1),
    "while a snapshot is taken": ("pipeline.checkpoint.checkpoints:rank_state", 4),
    "in an evaluation between steps": ("pipeline.evaluation.predict:Networks.__call__", 2),
    "in the evaluation at the end": ("pipeline.evaluation.report:predict", 1),
}
EVALUATED = "evaluation.every=7 steps"  # of the runs that are killed, but not of the uninterrupted ones


@dataclass(frozen=True)
class Kill:
    """Where a run is killed: by itself (``inject``), or after ``seconds`` from outside."""

    name: str
    case: str
    ranks: tuple[int, ...]
    inject: dict[str, Any] | None = None
    share: float | None = None  # of the uninterrupted run's time


def kills_of(case_names: Sequence[str], operations: Sequence[Sequence[str]], *, num: int, seed: int) -> Iterator[Kill]:
    """Yield ``num`` kills, spread over the cases, file operations first; ``operations`` by rank."""
    choose, cases = random.Random(seed), list(case_names)
    at = [(rank, label) for rank, labels in enumerate(operations) for label in labels]
    assert len(at) <= num, f"{len(at)} file operations need as many kills, not {num}"
    for index in range(num):
        case = cases[index % len(cases)]
        if index < len(at):
            rank, label = at[index]
            yield Kill(
                f"before: {label}",
                case,
                (rank,),
                {"call": "tests.support.injections:at_file_operation", "on_rank": rank, "label": label},
            )
        elif index < len(at) + 3 * len(MOMENTS):
            rank, (name, (function, number)) = index % 2, list(MOMENTS.items())[(index - len(at)) % len(MOMENTS)]
            number += choose.randrange(3) if number > 1 else 0
            inject = {
                "call": "tests.support.injections:in_function",
                "on_rank": rank,
                "function": function,
                "number": number,
            }
            yield Kill(name, case, (rank,), inject)
        else:
            yield Kill("at random", case, choose.choice([(0,), (1,), (0, 1), (0, 1)]), share=choose.random())


def of_one_save(listed: Path) -> list[list[str]]:
    """Select the file operations of one ticket and of the checkpoint of the same step.

    Returns:
        The operations of each rank.
    """
    wanted = ("step-00000030", "ticket-001", "step-00000022/", "step-00000022 ", "checkpoints ", "tickets ")
    found = []
    for rank in range(2):
        labels = dict.fromkeys(Path(f"{listed}.{rank}").read_text().splitlines())
        found.append([label for label in labels if any(part in f"{label} " for part in wanted)])
    return found


def kills(
    server: RankServer, data: Path, folder: Path, *, num: int, seed: int, cases: Sequence[str]
) -> tuple[int, int]:
    """Kill two-rank runs by SIGKILL; returns (number that differ, number of all)."""
    outcomes: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    (folder / "whole").mkdir()
    for case in cases:
        output = folder / "whole" / case
        listing = {
            "call": "tests.support.injections:at_file_operation",
            "on_rank": -1,
            "folder": str(output),
            "list_to": str(output) + ".files",
        }
        started = time.monotonic()
        require_codes(server.start(arguments(data, output, *CASES[case]), log=log_of(folder), inject=listing), [0, 0])
        seconds[case] = time.monotonic() - started
        outcomes[case] = outcome_of(output)
    with_tickets = [case for case in cases if "itop" not in str(CASES[case])] or list(cases)
    operations = of_one_save(folder / "whole" / f"{with_tickets[0]}.files")
    print(
        f"{len(operations[0])} + {len(operations[1])} file operations of a ticket and a checkpoint on ranks 0 and 1",
        flush=True,
    )
    wrong = num_replaced = 0
    for index, kill in enumerate(kills_of(cases, operations, num=num, seed=seed)):
        output, log = folder / f"kill-{index}", log_of(folder)
        needs_ticket = any(part in kill.name for part in ("ticket-001", "00000022", "00000030"))
        case = with_tickets[index % len(with_tickets)] if needs_ticket else kill.case
        has_label = bool(kill.inject and "label" in kill.inject)
        inject = {"folder": str(output), **kill.inject} if kill.inject and has_label else kill.inject
        share = kill.share
        while True:
            shutil.rmtree(output, ignore_errors=True)
            job = server.start(arguments(data, output, EVALUATED, *CASES[case]), log=log, inject=inject)
            if share is not None:
                time.sleep(share * seconds[case])
                job.kill(ranks=kill.ranks)
            codes = job.wait()
            is_killed = all(codes[rank] == -signal.SIGKILL for rank in kill.ranks)
            if is_killed or has_label or set(codes) - {0, -signal.SIGKILL}:
                break
            num_replaced += kill.share is None
            inject, share = None, 0.8 * (share or 1)  # the run ended before: try again, earlier
        what = f"kill {index}, {case}, {kill.name}, ranks {kill.ranks}"
        if is_killed:
            codes = server.start(arguments(data, output, EVALUATED, *CASES[case], resume="auto"), log=log).wait()
        if is_killed and codes == [0, 0] and not differs(what, outcomes[case], outcome_of(output)):
            shutil.rmtree(output)
            log.unlink()
        else:
            wrong += 1
            last = [line for line in log.read_text().splitlines() if "ERROR[" in line or "resume" in line]
            print(f"WRONG {what}: {'' if is_killed else 'not killed, '}codes {codes}; {last}", flush=True)
    print(f"{num_replaced} kills at moments that did not occur were made at random moments instead", flush=True)
    return wrong, num


def seconds_to_safe(server: RankServer, data: Path, folder: Path, *, num: int, seed: int) -> list[float]:
    """Send SIGTERM to one or both of two ranks at random moments of training.

    Returns:
        Seconds until both ranks have ended with the checkpoint on disk, for each of ``num`` runs.
    """
    choose, times = random.Random(seed), []
    for index in range(num):
        output = folder / f"stopped-{index}"
        job = server.start(arguments(data, output, *CASES["Sup-tickets, stage 0"]), log=log_of(folder))
        step = EVERY * choose.randrange(1, 4)
        manifest = output / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        job.wait_for(manifest.exists)
        started = time.monotonic()
        job.kill(signal.SIGTERM, ranks=choose.choice([(0,), (1,), (0, 1)]))
        require_codes(job, [75, 75])
        times.append(time.monotonic() - started)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--points", type=int, default=1000, metavar="N", help="number of random stops in one process (default: 1000)"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=100,
        metavar="N",
        help="number of two-rank runs to kill with SIGKILL (default: 100)",
    )
    parser.add_argument(
        "--stops", type=int, default=10, metavar="N", help="number of stops by SIGTERM to time (default: 10)"
    )
    parser.add_argument(
        "--regrouped",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also resume with other numbers of ranks: 4, 2, 1 and 4 (default: yes)",
    )
    parser.add_argument(
        "--stops-per-run", type=int, default=20, metavar="N", help="number of stops in each run (default: 20)"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        metavar="CASE",
        help=f"test only these cases: {'; '.join(CASES)} (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random stops (default: 0)")
    given = parser.parse_args(argv)
    is_well = True
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        folder = Path(name)
        (folder / "idx").mkdir()
        make_data(folder / "idx", folder)
        if given.kills or given.regrouped or given.stops:
            with RankServer.running(arguments(folder, folder / "run"), log=folder / "server.log") as server:
                if given.kills:
                    wrong, num = kills(server, folder, folder, num=given.kills, seed=given.seed, cases=given.cases)
                    is_well &= say("SIGKILLs of two ranks", wrong, num)
                if given.stops:
                    times = seconds_to_safe(server, folder, folder, num=given.stops, seed=given.seed)
                    median = statistics.median(times)
                    text = f"median {median:.2f} s, longest {max(times):.2f} s of {len(times)}"
                    print(f"from SIGTERM to the end, everything saved: {text}", flush=True)
                if given.regrouped:
                    is_well &= regrouped(server, folder, folder)
        if given.points:
            reuse_loaders(arguments(folder, folder / "run"))
            without_figures()
            counts = stop_points(
                folder,
                folder / "points",
                points=given.points,
                stops_per_run=given.stops_per_run,
                seed=given.seed,
                cases=given.cases,
            )
            is_well &= say("random stop points", *counts)
    print("all well" if is_well else "NOT WELL", flush=True)
    return 0 if is_well else 1


def say(what: str, wrong: int, num: int) -> bool:
    print(
        f"{what}: {num - wrong}/{num} identical bit for bit; failure rate below {upper_bound(wrong, num):.2%} (95%)",
        flush=True,
    )
    return not wrong


if __name__ == "__main__":
    sys.exit(main())

"""The study of docs/study-plan.md: train the registered cells, keep what they predicted, and judge the claims.

::

    python -m benchmarks.study --list
    python -m benchmarks.study fashion_mnist/0.1/rigl_itop --data data --runs runs/study
    python -m benchmarks.study fashion_mnist/0.1/edst+corrupted --data data --runs runs/study
    python -m benchmarks.study all --data data --runs runs/study --jobs 2 --missing
    python -m benchmarks.study --table
    python -m benchmarks.study --document docs/study.md docs/papers.md --figure docs/images/study.png
    python -m benchmarks.study zoo
    python -m benchmarks.study pack --data data --output study.npz

Each cell is one sweep (launchers/sweep.py) in a folder of its own. Started again, it keeps the runs that are done and
continues the others, so a study that was stopped goes on with the same command. An evaluation, CELL+HOW, is of the
tickets of a cell's finished runs, and goes on with those that have no kept result. Results are written to
``--results``, from which ``--table`` computes all intervals and verdicts; nothing is trained for that.
``zoo`` trains the runs of the zoo again, or those of the entries that follow it, and puts them in their places.
``pack`` writes the images and cells of Fashion-MNIST into one file, of which ``python -m benchmarks.gpu --study``
trains some on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.support import study_results
from benchmarks.support.study_cells import CELLS, Cell, data_settings
from benchmarks.support.study_evaluations import EVALUATIONS, HOW, Evaluation
from benchmarks.support.study_tables import fill_in, tables
from pipeline.command_line import ArgumentParser, local_path, run_to_end, whole_number
from pipeline.errors import ConfigError, RunError
from pipeline.files import parse_json, read_capped, write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study"
SWEEP = ROOT / "launchers" / "sweep.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_to_end(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    given = _parser().parse_args(arguments)
    if given.list:
        print("\n".join(f"{cell.name:28} {len(cell.seeds):3} seeds  {cell.about}" for cell in CELLS.values()))
        print("\n".join(f"{each.name:38} {HOW[each.how]}" for each in EVALUATIONS.values()))
        return 0
    if given.table or given.document or given.figure:
        load = functools.cache(functools.partial(study_results.load, folder=given.results))
        if given.table:
            print("\n".join(tables(load).values()))
        for document in given.document:
            write_atomically(document, fill_in(document.read_text(), tables(load)).encode())
        if given.figure:
            from benchmarks.support.study_figure import draw

            write_atomically(given.figure, draw(load))
        return 0
    if given.cells[:1] == ["zoo"]:
        from benchmarks.support import study_zoo  # imports torch

        study_zoo.remake(given.cells[1:], given.data, given.runs, train=train, extra=given.set, folder=given.zoo)
        return 0
    if given.cells == ["pack"]:
        from benchmarks.support import study_pack  # imports torch

        print(study_pack.write(given.output, data=given.data, results=given.results))
        return 0
    failed = []
    for each in _chosen(given.cells):
        if isinstance(each, Evaluation):
            evaluate(each, given.data, given.runs, given.results, extra=given.set)
            continue
        kept = study_results.load(each.name, given.results) if given.missing else None
        cell = missing(each, kept, given.runs)
        if not cell.seeds:
            continue
        code = train(cell, given.data, given.runs, jobs=given.jobs, extra=given.set)
        if code not in (0, 1):  # stopped, or refused: the others would be too
            return code
        failed += [cell.name] * code
        if reports := finished(cell, given.runs):
            new = study_results.collect(reports, kinds=cell.kinds)
            study_results.save(study_results.merge(kept, new), cell.name, given.results)
    if failed:
        raise RunError(f"{len(failed)} cells have failed runs: {', '.join(failed)}", do="read the lines above")
    return 0


def train(cell: Cell, data: Path, runs: Path, *, jobs: int, extra: Sequence[str] = ()) -> int:
    """Train the runs of a cell that are not done yet, and return the exit code of the sweep.

    Args:
        cell: which.
        data: folder of the data sets, by name.
        runs: folder of all runs of the study.
        jobs: runs at once, of one thread each.
        extra: further settings, for short trials; what they train is not the registered cell.
    """
    command = [
        *(sys.executable, str(SWEEP), "--config", cell.config, "--output", str(runs / cell.name)),
        *("--seeds", ",".join(map(str, cell.seeds)) + ",", "--threads", "1", "--jobs", str(jobs), "--nice", "19"),
        *data_settings(cell, data),
        *cell.settings,
        *extra,
    ]
    before = _cpu_seconds()
    code = subprocess.call(command)
    print(f"{cell.name}: {_cpu_seconds() - before:.0f} s of CPU time", flush=True)
    return code


def evaluate(evaluation: Evaluation, data: Path, runs: Path, results: Path, *, extra: Sequence[str] = ()) -> None:
    """Carry out an evaluation for the finished runs of its cell that have no kept result, and keep each at once.

    Args:
        evaluation: which.
        data: folder of the data sets, by name.
        runs: folder of all runs of the study.
        results: folder of the results that are kept.
        extra: further settings, those of the training for short trials.
    """
    kept = study_results.load(evaluation.name, results)
    done, have = finished(evaluation.cell, runs), kept.rows if kept is not None else {}
    numbers = [k for k, seeds in evaluation.seeds.items() if k not in have and all(seed in done for seed in seeds)]
    print(f"{evaluation.name}: {len(have)} of {len(evaluation.seeds)} kept, {len(numbers)} to do", flush=True)
    if not numbers:
        return
    from benchmarks.support import study_evaluate  # imports torch

    for number, result in study_evaluate.evaluate(evaluation, numbers, runs=runs, data=data, extra=extra):
        kept = study_results.merge(kept, study_results.gather({number: result}))
        study_results.save(kept, evaluation.name, results)


def missing(cell: Cell, kept: study_results.CellResult | None, runs: Path) -> Cell:
    """Return the cell with the seeds that have no kept result, and those that its sweep in the folder has already."""
    started = {path.name for path in (runs / cell.name).glob("seed=*")}
    done = kept.rows if kept is not None else {}
    seeds = tuple(seed for seed in cell.seeds if seed not in done or f"seed={seed}" in started)
    return replace(cell, seeds=() if set(cell.seeds) <= set(done) else seeds)


def finished(cell: Cell, runs: Path) -> dict[int, Path]:
    """Return the reports of the runs of a cell that are done, by seed."""
    record = runs / cell.name / "sweep.json"
    if not record.is_file():
        return {}
    members = parse_json(read_capped(record, study_results.MAX_BYTES))["members"]
    done = {member["seed"]: name for name, member in members.items() if member["exit_code"] == 0}
    return {seed: runs / cell.name / done[seed] / "report" for seed in cell.seeds if seed in done}


def _chosen(names: Sequence[str]) -> list[Cell | Evaluation]:
    known: dict[str, Cell | Evaluation] = {**CELLS, **EVALUATIONS}
    groups = {"all": list(known), "evaluations": list(EVALUATIONS)}
    wanted = [name for given in names for name in groups.get(given, [given])]
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"{unknown[0]}: is not a cell of the study", do="choose one that --list prints, or all")
    if not names:
        raise ConfigError("no cell is named", do="name cells that --list prints, or all")
    return [known[name] for name in dict.fromkeys(wanted)]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "cells",
        nargs="*",
        metavar="CELL",
        help="cells and evaluations of --list, or evaluations, or all; or zoo; or pack",
    )
    add("--list", action="store_true", help="print all cells, in the order in which all trains them")
    add("--table", action="store_true", help="print the tables of cells and of claims, and the verdicts")
    help_document = "put the tables between their markers in each FILE, such as docs/study.md"
    add("--document", type=local_path, nargs="+", default=[], metavar="FILE", help=help_document)
    help_figure = "draw accuracy against FLOPs into FILE, such as docs/images/study.png"
    add("--figure", type=local_path, metavar="FILE", help=help_figure)
    add("--data", type=local_path, default=Path("data"), metavar="FOLDER", help="data sets (default: %(default)s)")
    help_runs = "folder of the runs (default: %(default)s)"
    add("--runs", type=local_path, default=Path("runs/study"), metavar="FOLDER", help=help_runs)
    help_results = "folder of the results that are kept (default: benchmarks/results/study)"
    add("--results", type=local_path, default=RESULTS, metavar="FOLDER", help=help_results)
    add(
        "--zoo", type=local_path, default=ROOT / "zoo", metavar="FOLDER", help="the zoo (default: that of the checkout)"
    )
    help_missing = "train only seeds of which --results has none yet, as when the runs themselves are lost"
    add("--missing", action="store_true", help=help_missing)
    add("--output", type=local_path, default=Path("study.npz"), metavar="FILE", help="of pack (default: %(default)s)")
    add("--jobs", type=whole_number(1, 64), default=1, metavar="N", help="runs at once (default: %(default)s)")
    help_set = "setting for a short trial, such as plan.exploration.length='20 steps'; name other --runs and --results"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=help_set)
    return parser


if __name__ == "__main__":
    sys.exit(main())

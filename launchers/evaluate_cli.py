"""Command line of evaluation: checks paths and settings before slow imports."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launchers.ending import ending, log_to_terminal
from launchers.environment import check_environment
from pipeline.command_line import ArgumentParser, add_version, number, whole_number
from pipeline.errors import DataError, WriteError
from pipeline.files import require_writable

EXAMPLES = """\
examples, one for each launcher:
  python launchers/evaluate.py --tickets runs/a/tickets --data val.beton --recalibrate train.beton --output judged
  torchrun --nproc-per-node 2 launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  deepspeed --num_gpus 2 launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  python -m launchers.run --nproc-per-node 2 -- \\
      launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  srun --nodes 4 --ntasks-per-node 1 python -m launchers.run --nnodes 4 --nproc-per-node 8 --master-addr HOST -- \\
      launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of launchers/evaluate.py."""
    parser = ArgumentParser(
        prog="launchers/evaluate.py",
        allow_abbrev=False,
        description="Evaluate tickets: alone, superposed and as ensembles.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add(
        "--tickets",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of tickets, one per run, or URLs that fsspec supports; a dense run becomes the reference",
    )
    add("--data", type=Path, required=True, metavar="FILE", help="the .beton file to evaluate on")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the report (tables, JSON, figures, HTML page) and the superposed networks",
    )
    add(
        "--recalibrate",
        type=Path,
        metavar="FILE",
        help="superpose the tickets of every run, and recalibrate BatchNorm on this training .beton file",
    )
    add(
        "--corrupted",
        type=Path,
        metavar="DIR",
        help="folder of corrupted copies <corruption>-<severity>.beton, made by python -m data_prep corrupt",
    )
    add(
        "--ood",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".beton files of images that belong to none of the classes (out of distribution)",
    )
    add("--adversarial", action="store_true", help="measure accuracy under FGSM and PGD attacks")
    add(
        "--adversarial-images",
        type=whole_number(1, 10**9),
        metavar="N",
        help="attack only N images, evenly spread, because PGD is slow (default: all)",
    )
    add(
        "--epsilon",
        type=number(0, 255, is_minimum_allowed=False),
        default=8.0,
        metavar="N",
        help="largest change of a pixel by an attack, on the 0–255 scale (default: 8)",
    )
    add("--pgd-steps", type=whole_number(1, 10**9), default=10, metavar="N", help="steps of PGD (default: 10)")
    add("--flip", action="store_true", help="average the predictions for each image and its horizontal flip")
    add(
        "--temperature",
        action="store_true",
        help="report NLL and ECE after temperature scaling too; "
        "each half of the images is scaled with the temperature fitted on the other half",
    )
    add(
        "--use",
        choices=("all", "last"),
        default="all",
        help="use all tickets of every run, or only the last one of each (for DST ensembles); default: all",
    )
    add(
        "--other-class-list",
        action="store_true",
        help="accept a data set whose class names differ from those of the training set",
    )
    add("--overwrite", action="store_true", help="replace an existing report")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    help_overrides = (
        "settings: data.num_workers, data.eval_resolution, evaluation.*, train.precision, train.threads_per_rank, "
        "tracking.*"
    )
    add("overrides", nargs="*", default=[], metavar="key=value", help=help_overrides)
    return parser.parse_args(_overrides_last(argv))


def main(evaluate: Callable[..., Any], argv: Sequence[str]) -> int:
    """Parse, check and call ``evaluate(config, runs, sets, given)``; return the exit code."""
    with ending() as end:
        given = parse(argv)
        check_environment()
        log_to_terminal()
        _check_paths(given)
        end.output_dir = given.output
        from pipeline.config.load import check_overrides

        check_overrides(given.overrides)
        from pipeline.evaluation import inputs

        inputs.check_settings(given.overrides)
        sets = inputs.open_sets(given.data, train=given.recalibrate, corrupted=given.corrupted, other_classes=given.ood)
        from pipeline.tickets.remote import fetched

        with fetched(given.tickets) as folders:
            runs = inputs.open_runs(folders, use=given.use)
            inputs.check_classes(runs, sets, may_differ=given.other_class_list)
            config = inputs.configure(runs, sets, output=given.output, overrides=given.overrides)
            evaluate(config, runs, inputs.with_held_out(sets, config), given)
    return end.code


def _overrides_last(argv: Sequence[str]) -> list[str]:
    """Move ``key=value`` arguments to the end, where an option that takes several files cannot consume them."""
    overrides = [text for text in argv if "=" in text and not text.startswith("-") and not Path(text).exists()]
    return [text for text in argv if text not in overrides] + (["--", *overrides] if overrides else [])


def _check_paths(given: argparse.Namespace) -> None:
    for folder in given.tickets:
        if "://" not in folder and not Path(folder).is_dir():
            raise DataError(f"--tickets {folder}: is not a folder", do="pass folders of tickets")
    for path in filter(None, (given.data, given.recalibrate, *given.ood)):
        if not path.exists():
            raise DataError(
                f"{path}: does not exist", do="check the path, or write the data set with python -m data_prep"
            )
    require_writable(given.output, setting="--output")
    if (given.output / "report.json").exists() and not given.overwrite:
        raise WriteError(f"{given.output}: already holds a report", do="choose another --output, or add --overwrite")

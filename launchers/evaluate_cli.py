"""Command line of evaluation: checks paths and settings before slow imports."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launchers.ending import ending, log_to_terminal
from launchers.environment import check_environment, require_rank
from pipeline import zoo
from pipeline.command_line import ArgumentParser, add_version, local_path, number, path_or_url, whole_number
from pipeline.errors import ConfigError, DataError, ServiceError, WriteError
from pipeline.files import require_writable
from pipeline.parts import import_parts
from pipeline.terminal.live import line

EXAMPLES = """\
examples, one for each launcher:
  python launchers/evaluate.py --tickets runs/a/tickets --data val.beton --recalibrate train.beton --output judged
  torchrun --nproc-per-node 2 launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  deepspeed --num_gpus 2 launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  python -m launchers.run --nproc-per-node 2 -- \\
      launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
  srun --nodes 4 --ntasks-per-node 8 --gpus-per-task 1 \\
      python launchers/evaluate.py --tickets runs/*/tickets --data val.beton --output judged
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of launchers/evaluate.py."""
    parser = ArgumentParser(
        prog="launchers/evaluate.py",
        allow_abbrev=False,
        description="Evaluate tickets, the sparse networks that a training run saves: individually, superposed (merged "
        "into one network) and as ensembles.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add(
        "--tickets",
        type=path_or_url,
        nargs="+",
        required=True,
        metavar="PLACE",
        help="run, folder of tickets, ticket file, any URL that fsspec supports, or an entry of the zoo; one per run. "
        "A dense run, if there is one, is the reference that the others are compared with",
    )
    add("--data", type=local_path, required=True, metavar="FILE", help=".beton file to evaluate on")
    add(
        "--output",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder for the report (tables, JSON, figures and an HTML page) and the superposed networks",
    )
    add(
        "--recalibrate",
        type=local_path,
        metavar="FILE",
        help="training .beton file; if it is given, the tickets of each run are also superposed (merged into one "
        "network), and BatchNorm is recalibrated on this file",
    )
    add(
        "--corrupted",
        type=local_path,
        metavar="FOLDER",
        help="folder with corrupted copies of the data set, named <corruption>-<severity>.beton, as "
        "python -m data_prep corrupt writes them",
    )
    add(
        "--ood",
        type=local_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".beton file of images that belong to none of the classes (out of distribution)",
    )
    add("--adversarial", action="store_true", help="also measure the accuracy under FGSM and PGD attacks")
    add(
        "--adversarial-images",
        type=whole_number(1, 10**9),
        metavar="N",
        help="attack only N evenly spaced images, because PGD is slow (default: all)",
    )
    add(
        "--epsilon",
        type=number(0, 255, is_minimum_allowed=False),
        default=8.0,
        metavar="N",
        help="largest change that an attack makes to a pixel value, on the 0–255 scale (default: 8)",
    )
    add(
        "--pgd-steps",
        type=whole_number(1, 10**9),
        default=10,
        metavar="N",
        help="number of PGD steps per image (default: 10)",
    )
    add(
        "--sparse",
        action="store_true",
        help="run tickets, superposed networks and ensembles on the CPU with their active weights only, and report "
        "milliseconds an image beside those of the dense network",
    )
    add("--flip", action="store_true", help="average the predictions for each image and its horizontal flip")
    add(
        "--temperature",
        action="store_true",
        help="also report NLL and ECE after temperature scaling; "
        "the logits of each half of the images are divided by the temperature fitted on the other half",
    )
    add(
        "--use",
        choices=("all", "last"),
        default="all",
        help="all: use all tickets of each run; last: only the last ticket of each, for ensembles of networks "
        "from separate runs of dynamic sparse training (DST) (default: all)",
    )
    add(
        "--other-class-list",
        action="store_true",
        help="accept a data set whose class names differ from those that the tickets were trained on",
    )
    add(
        "--imports",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package of your own to import first, whose networks the tickets are of; may be repeated",
    )
    add("--overwrite", action="store_true", help="replace the report that is already in --output")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    help_overrides = (
        "configuration setting to override: data.num_workers, data.eval_resolution, train.precision, "
        "train.threads_per_rank, train.device, or any key of evaluation and tracking"
    )
    add("overrides", nargs="*", default=[], metavar="key=value", help=help_overrides)
    return parser.parse_args(_overrides_last(argv))


def main(evaluate: Callable[..., Any], argv: Sequence[str]) -> int:
    """Parse, check and call ``evaluate(config, runs, sets, given)``; return the exit code."""
    with ending() as end:
        given = parse(argv)
        check_environment()
        require_rank()
        log_to_terminal()
        end.is_output_a_log = True
        given.tickets = [from_zoo(place) for place in given.tickets]
        _check_paths(given)
        import_parts(given.imports, setting="--imports")
        end.output_dir = given.output
        from pipeline.config.load import check_overrides

        check_overrides(given.overrides)
        line.show(lambda _: "loading torch, checking data sets and tickets")
        from pipeline.evaluation import inputs

        inputs.check_settings(given.overrides)
        sets = inputs.open_sets(given.data, train=given.recalibrate, corrupted=given.corrupted, other_classes=given.ood)
        from pipeline.tickets.remote import fetched
        from pipeline.tracking.place import check_tracking
        from pipeline.training.shapes import check_eval_resolution

        with fetched(given.tickets) as folders:
            runs = inputs.open_runs(folders, use=given.use, may_differ=given.other_class_list)
            inputs.check_classes(runs, sets, may_differ=given.other_class_list)
            config = inputs.configure(runs, sets, output=given.output, overrides=given.overrides)
            check_tracking(config.tracking, given.output)
            check_eval_resolution(config, (ref for run in runs for ref in run.refs))
            line.show(None)
            evaluate(config, runs, inputs.with_held_out(sets, config), given)
    return end.code


def _overrides_last(argv: Sequence[str]) -> list[str]:
    """Move ``key=value`` arguments to the end, where an option that takes several files cannot consume them."""
    overrides = [text for text in argv if "=" in text and not text.startswith("-") and not Path(text).exists()]
    return [text for text in argv if text not in overrides] + (["--", *overrides] if overrides else [])


def from_zoo(place: str) -> str:
    """Return the folder of tickets that the name of an entry of the zoo stands for; anything else is left as it is."""
    if "://" in place or Path(place).exists() or place not in zoo.entries():
        return place
    return str(zoo.find(place) / "tickets")


def _check_paths(given: argparse.Namespace) -> None:
    for folder in given.tickets:
        if "://" not in folder and not Path(folder).exists():
            known = ", ".join(sorted(zoo.entries()))
            raise DataError(
                f"--tickets {folder}: does not exist",
                do=f"pass runs, folders of tickets, ticket files{f' or entries of the zoo: {known}' if known else ''}",
            )
    for path in filter(None, (given.data, given.recalibrate, *given.ood)):
        if not path.exists():
            raise DataError(
                f"{path}: does not exist", do="check the path, or write the data set with python -m data_prep"
            )
    if given.sparse and given.adversarial:
        raise ConfigError(
            "--adversarial: attacks need gradients, which --sparse does not compute", do="leave out one of the two"
        )
    if given.sparse and find_spec("llvmlite") is None:
        raise ServiceError("--sparse needs llvmlite, which is not installed", do="python -m pip install llvmlite")
    require_writable(given.output, setting="--output")
    if (given.output / "report.json").exists() and not given.overwrite:
        raise WriteError(f"{given.output}: already holds a report", do="choose another --output, or add --overwrite")

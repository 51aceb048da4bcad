"""``python -m pipeline.tracking``: open or compare runs in MLflow, and send it the records that it does not have."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from pipeline.command_line import ArgumentParser, add_version, commands_of, local_path, path_or_url, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if the server has all records."""
    return run_command(build_parser, arguments)


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(
        prog="python -m pipeline.tracking",
        description="Look at runs in MLflow, and send MLflow the records that it does not have yet.",
        allow_abbrev=False,
    )
    add_version(parser)
    add = commands_of(parser)
    for name, compares, text in (
        ("open", False, "open the page of each run in MLflow's web interface"),
        ("compare", True, "open one page that compares the runs, with their accuracies and curves"),
    ):
        shown = add(name, _show, f"{text}; the server runs until Ctrl-C")
        shown.add_argument("output_dirs", type=local_path, nargs="+", metavar="OUTPUT_DIR", help="folder of a run")
        shown.add_argument("--no-browser", action="store_true", help="only print the address")
        shown.set_defaults(compares=compares)
    replay = add(
        "replay", _replay, "send the records that MLflow does not have yet, with their original steps and times"
    )
    replay.add_argument(
        "output_dir", type=local_path, metavar="OUTPUT_DIR", help="folder of the run, which contains metrics.jsonl"
    )
    replay.add_argument(
        "--uri",
        type=path_or_url,
        default="",
        metavar="URI",
        help="tracking server to send to (default: the run's own, which receives only what it lacks; any other "
        "receives all records)",
    )
    return parser


def _show(options: argparse.Namespace) -> int:
    from pipeline.tracking.ui import show

    return show(options.output_dirs, compares=options.compares, opens_browser=not options.no_browser)


def _replay(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from pipeline.tracking.spooled import replay

    num_records = replay(options.output_dir, uri=options.uri)
    print(f"sent {num_records} records of {options.output_dir}: MLflow has all of them now")
    return 0


if __name__ == "__main__":
    sys.exit(main())

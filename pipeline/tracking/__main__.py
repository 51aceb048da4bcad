"""``python -m pipeline.tracking replay <output_dir>``: send MLflow what it missed."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.command_line import ArgumentParser, add_version, commands_of, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 when the server has everything."""
    return run_command(build_parser, arguments)


def build_parser() -> ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(prog="python -m pipeline.tracking", description=__doc__, allow_abbrev=False)
    add_version(parser)
    replay = commands_of(parser)(
        "replay", _replay, "send what MLflow has not got yet, with its original steps and times"
    )
    replay.add_argument("output_dir", type=Path, help="the run's folder, with metrics.jsonl")
    replay.add_argument(
        "--uri", default="", help="tracking server (default: the run's own); another server gets the whole run"
    )
    return parser


def _replay(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from pipeline.tracking.spooled import replay

    num_records = replay(options.output_dir, uri=options.uri)
    print(f"{num_records} records of {options.output_dir} sent: MLflow has everything")
    return 0


if __name__ == "__main__":
    sys.exit(main())

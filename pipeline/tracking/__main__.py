"""``python -m pipeline.tracking replay <output_dir>``: send MLflow what it missed."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pipeline.errors import RunError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the server has everything."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    replay_command = commands.add_parser(
        "replay", help="send what MLflow has not got yet, with its original steps and times"
    )
    replay_command.add_argument("output_dir", type=Path, help="the run's folder, with metrics.jsonl")
    replay_command.add_argument(
        "--uri", default="", help="tracking server (default: the run's own); another server gets the whole run"
    )
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from pipeline.tracking.spooled import replay

    try:
        num_records = replay(options.output_dir, uri=options.uri)
    except RunError as error:
        print(f"ERROR[{error.code}] {error}", file=sys.stderr)
        return error.code
    print(f"{num_records} records of {options.output_dir} sent: MLflow has everything")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m pipeline.tickets``: list, show, verify, compare, export, import, publish and run tickets.

Slow imports wait until the arguments have been checked. Each group of commands is a module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.command_line import ArgumentParser, add_version, commands_of, run_command
from pipeline.tickets import convert_cli, hub_cli, run_cli, show_cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error that a user can cause is one line on stderr."""
    return run_command(build_parser, arguments)


def build_parser() -> ArgumentParser:
    """Build the parser of all commands."""
    parser = ArgumentParser(
        prog="python -m pipeline.tickets",
        description="List, show, verify, compare, export, import, publish and run tickets: files that each hold one "
        "trained sparse network. A path may also be any URL that fsspec supports, such as hf://owner/name. Where one "
        "file is expected, a run or a folder of tickets stands for its last ticket.",
        allow_abbrev=False,
    )
    add_version(parser)
    command = commands_of(parser)
    for group in (show_cli, convert_cli, hub_cli, run_cli):
        group.add_commands(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())

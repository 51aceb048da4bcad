"""What the commands about tickets share. Standard library only, but for what :func:`read` reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import Command
from pipeline.errors import WriteError

if TYPE_CHECKING:
    from pipeline.tickets.format import Ticket

Add = Callable[[str, Command, str], argparse.ArgumentParser]  # adds a command: name, function, what it does


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Give a command that builds networks ``--imports``."""
    parser.add_argument(
        "--imports",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="package of your own to import first, whose network it is; may be repeated",
    )


def require_new(output: Path) -> None:
    """Check that a file does not exist yet. Raises WriteError."""
    if output.exists():
        raise WriteError(f"{output}: already exists", do="choose another name, or remove the file")


def read(place: str) -> Ticket:
    """Read what a user names as a ticket; raises the errors of :func:`pipeline.tickets.place.read_ticket`."""
    from pipeline.tickets.place import read_ticket

    return read_ticket(place)


def print_table(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    """Print rows of cells in columns.

    Args:
        rows: the head and the others, all of one length.
        left: columns that are aligned to the left.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip())

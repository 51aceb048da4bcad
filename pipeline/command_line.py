"""What the project's command lines share. Standard library only."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import ConfigError, RunError

Command = Callable[[argparse.Namespace], int]  # returns the exit code


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError, with its exit code, where argparse would print its usage and exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", do=f"see {self.prog} --help")


def commands_of(parser: ArgumentParser) -> Callable[[str, Command, str], argparse.ArgumentParser]:
    """Give the parser commands: what is returned adds one, of that name, that runs this and is described by that."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    return add


def run_command(parser: Callable[[], ArgumentParser], arguments: Sequence[str] | None) -> int:
    """Run the command that is asked for and return its exit code; an error a user can cause is one line on stderr."""
    try:
        options = parser().parse_args(arguments)
        return int(options.run(options))
    except RunError as error:
        print(f"ERROR[{error.code}] {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def leave(code: int) -> NoReturn:
    """End the process with ``code``, without the interpreter's teardown.

    After a process group was used, one exit in eight or so aborts in it (``terminate called without
    an active exception``: seen with torch
    2.14 and gloo, the group destroyed and everything done), and a finished run would look like a failed one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

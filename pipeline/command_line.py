"""Shared parts of the project's command lines: argument types, and the end of a command. Standard library only."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline import __version__
from pipeline.errors import ConfigError, RunError, ServiceError, WriteError, with_advice
from pipeline.numbers import is_whole_number
from pipeline.terminal.live import line
from pipeline.terminal.streams import guard_output, lost_output

Command = Callable[[argparse.Namespace], int]  # returns the exit code
# what a shell would replace: $NAME, ${NAME}, $(command), $$
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*|\$\{[^}]*\}?|\$\(|\$\$")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|sqlite:|file:")
_HOME_IN_ADDRESS = re.compile(r"(?:sqlite|file|local)[a-z0-9+.-]*:/*~")


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError, with its exit code, where argparse would print its usage and exit with 2."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"command line: {message}", do=f"see {self.prog} --help")

    def option_names(self) -> list[str]:
        """Return every option, as ``--name``."""
        return list(self._option_string_actions)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give the parser ``--version``."""
    parser.add_argument(
        "--version", action="version", version=f"ticketworks {__version__}", help="print the version and exit"
    )


def commands_of(parser: ArgumentParser) -> Callable[[str, Command, str], argparse.ArgumentParser]:
    """Give the parser subcommands; return a function that adds one.

    Its arguments are the name, the function to run, and what the command does (a phrase: the verb first, no full stop).
    """
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    return add


# -- argument types


def whole_number(minimum: int, maximum: int = 1 << 40) -> Callable[[str], int]:
    """Return the argument type of whole numbers from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        if not is_whole_number(text, minimum, maximum):
            bounds = f"of at least {minimum}" if maximum == 1 << 40 else f"from {minimum} to {maximum}"
            digits = "" if re.fullmatch("-?[0-9]+", text) else ", written in digits 0–9"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {bounds}{digits}")
        return int(text)

    return parse


def number(minimum: float, maximum: float, *, is_minimum_allowed: bool = True) -> Callable[[str], float]:
    """Return the argument type of numbers from ``minimum`` (or above it) to ``maximum``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum or (value == minimum and not is_minimum_allowed):  # nan fails too
            bounds = (
                f"from {minimum:g} to {maximum:g}"
                if is_minimum_allowed
                else f"above {minimum:g} and at most {maximum:g}"
            )
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {bounds}")
        return value

    return parse


def local_path(text: str) -> Path:
    """Return a path; the argument type of files and folders."""
    return Path(path_or_url(text))


def path_or_url(text: str) -> str:
    """Return a path or URL as text; the argument type of what may be either."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def expand_home(text: str, *, interpolates: bool = False) -> str:
    """Return a path that a user gave, with ``~`` or ``~user`` at its start replaced; a URL is not changed.

    No shell expands what stands in a file or in quotes, nor the ``~`` of ``key=~/path``. Variables
    are refused rather than used as the name of a folder.

    Args:
        text: a path, or a URL such as ``s3://bucket/run``.
        interpolates: allow ``${key}``, which the configuration replaces later.

    Raises:
        ValueError: it contains a variable, a user without a home folder, or ``~`` in the URL of a file.
    """
    is_url = bool(_ADDRESS.match(text))
    place = text.rpartition("@")[2] if is_url else text  # a password before the @ may contain a $
    variables = [name for name in _VARIABLE.findall(place) if not (interpolates and name.startswith("${"))]
    if variables:
        what = "commands" if variables[0] == "$(" else "variables"
        home = ", or ~ for $HOME" if not is_url and what == "variables" else ""
        raise ValueError(f"contains {variables[0]}, but {what} are not expanded; write the value{home}")
    if is_url:
        if _HOME_IN_ADDRESS.match(text):
            raise ValueError("contains ~, which is not expanded in a URL; write the absolute path")
        return text
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # there is no such user, or HOME is not set and this user has no entry
        user = text.partition("/")[0]
        raise ValueError(
            f"the home folder {user} is not known; write the whole path, "
            f"or ./{text} if the folder itself is called {user}"
        ) from None


# -- how a command ends


def error_line(
    code: int, what: str, *, do: str = "", rank: str = "", step: int | None = None, crash_file: str = ""
) -> str:
    """Format the line that says why a command fails: ``ERROR[code] rank=R step=S what; do: … (traceback in …)``."""
    where = [f"rank={rank}"] if rank else []
    where += [] if step is None else [f"step={step}"]
    file = f" (traceback in {crash_file})" if crash_file else ""
    return " ".join([f"ERROR[{code}]", *where, f"{with_advice(what, do)}{file}"])


def stop_line(code: int, what: str, *, command: str, rank: str = "", step: int | None = None) -> str:
    """Format the line for a run that was stopped and can be resumed: ``STOPPED[code] … what; resume with: …``."""
    line = error_line(code, what, rank=rank, step=step).removeprefix("ERROR")
    return f"STOPPED{line}; resume with: {command}"


def report(error: RunError) -> int:
    """Print an error's line on stderr and return its exit code."""
    print(error_line(error.code, error.what, do=error.do), file=sys.stderr, flush=True)
    return error.code


def missing_package(error: ModuleNotFoundError) -> ServiceError:
    """Return the error for a package that is not installed; it says how to install it."""
    return ServiceError(
        f"{error.name} is not installed for {sys.executable}",
        do="source .venv/bin/activate, or pip install -e '.[train]' in the checkout",
    )


def run_to_end(action: Callable[[], int]) -> int:
    """Call ``action`` and return its exit code; an error that a user can cause is one line on stderr."""
    guard_output()
    try:
        code = action()
        require_output()
    except RunError as error:
        return report(error)
    except ModuleNotFoundError as error:
        return report(missing_package(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        line.close()
    return code


def require_output() -> None:
    """Check, at the end of a command, that what it printed could be written.

    Raises:
        WriteError: something was lost, for another reason than a reader that had gone.
    """
    sys.stdout.flush()
    if lost := lost_output():
        raise WriteError(
            f"the output could not be written: {lost.strerror or lost}; the command has done all else",
            do="free space where the output goes, or send it elsewhere, and run it again",
        )


def run_command(parser: Callable[[], ArgumentParser], arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run the chosen command (their ``run``) with :func:`run_to_end`."""

    def run() -> int:
        options = parser().parse_args(arguments)
        return int(options.run(options))

    return run_to_end(run)


def leave(code: int) -> NoReturn:
    """End the process with ``code``, without the interpreter's teardown.

    After a process group was used, about one exit in eight aborts in the teardown (``terminate called
    without an active exception``; seen with torch 2.14 and gloo, after the group was destroyed), and a
    finished run would look like a failed one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

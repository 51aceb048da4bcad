"""What the project's command lines share: argument types, and how a command ends. Standard library only."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pipeline import __version__
from pipeline.errors import ConfigError, RunError, ServiceError

Command = Callable[[argparse.Namespace], int]  # returns the exit code


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError, with its exit code, where argparse would print its usage and exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", do=f"see {self.prog} --help")

    def option_names(self) -> list[str]:
        """Every option, as ``--name``."""
        return list(self._option_string_actions)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give the parser ``--version``."""
    parser.add_argument(
        "--version", action="version", version=f"ticketworks {__version__}", help="print the version and end"
    )


def commands_of(parser: ArgumentParser) -> Callable[[str, Command, str], argparse.ArgumentParser]:
    """Give the parser commands: what is returned adds one, of that name, that runs this and is described by that."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    return add


# -- argument types


def is_whole_number(text: str, minimum: int, maximum: int) -> bool:
    """Whether ``text`` is a decimal number from ``minimum`` to ``maximum``, without a sign."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and minimum <= int(text) <= maximum


def whole_number(minimum: int, maximum: int = 1 << 40) -> Callable[[str], int]:
    """The argument type of whole numbers from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        if not is_whole_number(text, minimum, maximum):
            upper = "" if maximum == 1 << 40 else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {minimum}{upper}")
        return int(text)

    return parse


def number(minimum: float, maximum: float, *, is_minimum_allowed: bool = True) -> Callable[[str], float]:
    """The argument type of numbers from ``minimum``, or above it, to ``maximum``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum or (value == minimum and not is_minimum_allowed):  # nan is neither
            bounds = (
                f"from {minimum:g} to {maximum:g}"
                if is_minimum_allowed
                else f"above {minimum:g} and at most {maximum:g}"
            )
            raise argparse.ArgumentTypeError(f"'{text}' is not a number {bounds}")
        return value

    return parse


# -- how a command ends


def error_line(
    code: int, what: str, *, do: str = "", rank: str = "", step: int | None = None, crash_file: str = ""
) -> str:
    """The one line in which a command says why it ends: ``ERROR[code] rank=R step=S what; do: … (traceback in …)``."""
    where = [f"rank={rank}"] if rank else []
    where += [] if step is None else [f"step={step}"]
    advice = f"; do: {do}" if do else ""
    file = f" (traceback in {crash_file})" if crash_file else ""
    return " ".join([f"ERROR[{code}]", *where, f"{what}{advice}{file}"])


def stop_line(code: int, what: str, *, command: str, rank: str = "", step: int | None = None) -> str:
    """The one line in which a run says that it was stopped and is not over: ``STOPPED[code] … what; resume with: …``."""
    line = error_line(code, what, rank=rank, step=step).removeprefix("ERROR")
    return f"STOPPED{line}; resume with: {command}"


def report(error: RunError) -> int:
    """Print an error's line on stderr and return its exit code."""
    print(error_line(error.code, error.what, do=error.do), file=sys.stderr, flush=True)
    return error.code


def missing_package(error: ModuleNotFoundError) -> ServiceError:
    """The error that names a package which is not installed, and how to install it."""
    return ServiceError(
        f"{error.name} is not installed for {sys.executable}",
        do="source .venv/bin/activate, or pip install -e '.[train]' in the checkout",
    )


def run_to_end(action: Callable[[], int]) -> int:
    """Call ``action`` and return its exit code; an error a user can cause is one line on stderr."""
    ignore_closed_output()
    try:
        return action()
    except RunError as error:
        return report(error)
    except ModuleNotFoundError as error:
        return report(missing_package(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run_command(parser: Callable[[], ArgumentParser], arguments: Sequence[str] | None) -> int:
    """Run the command that is asked for (``run`` of the parsed arguments) as :func:`run_to_end` does."""

    def run() -> int:
        options = parser().parse_args(arguments)
        return int(options.run(options))

    return run_to_end(run)


class _ClosableFile(io.FileIO):
    """A descriptor whose bytes are thrown away once nobody reads them."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            return memoryview(content).nbytes


def ignore_closed_output() -> None:
    """From now on it is no error that stdout or stderr is a pipe that nobody reads any more, as in ``COMMAND | head``.

    The command goes on to its end, and has the exit code that it would have had. Streams that were
    replaced, as by a test, are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        replacement = io.TextIOWrapper(
            io.BufferedWriter(_ClosableFile(stream.fileno(), "wb", closefd=False)),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, replacement)


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

"""Reads the arguments of the project's commands without running them.

``python -m tests.support.parse_commands`` takes commands as JSON on stdin, each a list of words that starts with
``-m MODULE`` or a script, and prints for each what is wrong with its arguments, "" if nothing is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
from typing import Any

import pipeline.command_line
from pipeline.config.load import load_config
from pipeline.errors import RunError


class Parsed(BaseException):
    """Ends a command once its arguments are read."""


def reading(name: str) -> Any:
    original = getattr(argparse.ArgumentParser, name)

    def parse(*arguments: Any, **named: Any) -> Any:
        raise Parsed(original(*arguments, **named))

    return parse


def fault_of(words: list[str]) -> str:
    """Return what is wrong with the arguments of a command; empty if nothing is."""
    sys.argv = words[1:] if words[0] == "-m" else words
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
    except Parsed as parsed:
        given = parsed.args[0]
        if words[0] == "launchers/train.py" and given.config:
            try:
                load_config(given.config, given.overrides)
            except RunError as error:
                return str(error)
        return ""
    except SystemExit as end:
        return f"exit {end.code}: {said.getvalue()}"
    return f"no arguments were read: {said.getvalue()}"


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    pipeline.command_line.leave = sys.exit  # type: ignore[assignment]  # not os._exit
    for method in ("parse_args", "parse_intermixed_args"):
        setattr(argparse.ArgumentParser, method, reading(method))
    print(json.dumps([fault_of(words) for words in commands]))

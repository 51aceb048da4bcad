"""What the project's command lines share. Standard library only."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import NoReturn

from pipeline.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError, with its exit code, where argparse would print its usage and exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", do=f"see {self.prog} --help")


def leave(code: int) -> NoReturn:
    """End the process with ``code``, without the interpreter's teardown.

    After a process group was used, one exit in eight or so aborts in it (``terminate called without an active exception``: seen with torch
    2.14 and gloo, the group destroyed and everything done), and a finished run would look like a failed one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

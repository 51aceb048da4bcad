"""What the project's command lines share. Standard library only."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pipeline.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigError, with its exit code, where argparse would print its usage and exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", do=f"see {self.prog} --help")

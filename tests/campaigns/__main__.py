"""``make campaigns``: lists the long campaigns, or runs those that are named.

    python -m tests.campaigns                 the table, from tests/README.md
    python -m tests.campaigns resume fuzz     one after the other; `all` for all of them

Ends with 1 when one of them failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.command_line import ArgumentParser, run_to_end
from pipeline.errors import ConfigError
from tests.support.launch import ROOT

ROW = re.compile(r"^\| `(\w+)( [^`]*)?`( \(root\))? \| (.*?) \| [^|]* \| (\d+) \|$", re.MULTILINE)
DATA = "data/fashion_mnist"  # of the demo


@dataclass(frozen=True)
class Campaign:
    """A row of the table."""

    name: str
    arguments: tuple[str, ...]
    needs_root: bool
    text: str
    minutes: int


def campaigns() -> dict[str, Campaign]:
    """The rows of the table in tests/README.md, by name."""
    rows = ROW.findall((ROOT / "tests/README.md").read_text())
    return {
        name: Campaign(name, tuple(options.replace("DIR", DATA).split()), bool(root), text, int(minutes))
        for name, options, root, text, minutes in rows
    }


def run(names: Sequence[str]) -> int:
    """Run the campaigns of these names, or print the table when there are none. Returns the exit code."""
    known = campaigns()
    if not names:
        for each in known.values():
            print(f"{each.name:16}{each.minutes:4} min  {each.text}{' (needs root)' if each.needs_root else ''}")
        print(
            f'\nmake campaigns RUN="{" ".join(list(known)[:2])}" runs two of them, RUN=all all: {total(known)} minutes'
        )
        return 0
    chosen = list(known) if "all" in names else list(names)
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigError(f"{unknown[0]} is not a campaign", do=f"choose from {', '.join(known)} or all")
    failed = []
    for name in chosen:
        print(f"== {name}, about {known[name].minutes} minutes", flush=True)
        command = [sys.executable, "-m", f"tests.campaigns.{name}", *known[name].arguments]
        failed += [name] if subprocess.run(command, cwd=ROOT).returncode else []
    print(f"failed: {', '.join(failed)}" if failed else f"{len(chosen)} campaigns passed")
    return 1 if failed else 0


def total(known: dict[str, Campaign]) -> int:
    """Minutes of all campaigns."""
    return sum(each.minutes for each in known.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m tests.campaigns",
        description="Run test campaigns: long tests that inject many faults, such as loading 500 damaged files.",
        allow_abbrev=False,
    )
    help_names = "name of a test campaign, or all (default: list the campaigns)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help_names)
    return run_to_end(lambda: run(parser.parse_args(arguments).names))


if __name__ == "__main__":
    sys.exit(main())

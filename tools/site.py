"""Builds the documentation: ``make docs``, or ``python3 tools/site.py [--output FOLDER]``. Standard library only.

mkdocs is installed once, in the versions of requirements-docs.lock (170 MB), into an environment of its own
beside that of ``make env``. A warning of mkdocs, such as a link that leads nowhere, is an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))
from pipeline.command_line import local_path  # noqa: E402
from tools.environment import locked_requirements, shared_environment, shared_root  # noqa: E402

LOCK = CHECKOUT / "requirements-docs.lock"


def build(output: Path, *, checkout: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout into a folder; what mkdocs says is in ``stdout``."""
    environment = shared_environment(shared_root(), locked_requirements(LOCK), is_complete=True)
    command = [str(environment / "bin/mkdocs"), "build", "--strict", "--config-file", str(checkout / "mkdocs.yml")]
    return subprocess.run(
        [*command, "--site-dir", str(output.absolute())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


def main() -> int:
    """Build, say where the site is, and return the exit code."""
    parser = argparse.ArgumentParser(description="Build the documentation.")
    parser.add_argument(
        "--output", type=local_path, default=CHECKOUT / "site", help="folder of the site (default: site)"
    )
    output = parser.parse_args().output
    done = build(output)
    if done.returncode:
        print(done.stdout)
        print("ERROR[65] the site has warnings, see above; do: mend these pages", file=sys.stderr)
        return 65
    print(f"open {output / 'index.html'}: it needs no server and no network")
    return 0


if __name__ == "__main__":
    sys.exit(main())

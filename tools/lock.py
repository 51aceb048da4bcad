"""Writes requirements.lock, the exact version of every package that the tests run with, and requirements-docs.lock.

    make lock                      after a change of pyproject.toml: every version that still fits is kept
    make lock NEWEST="torch mlflow"   these packages in their newest version that pyproject.toml allows
    make lock NEWEST=all           everything in its newest version

Run `make test` with the new lock, and commit both together. Only pip decides, and nothing is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import site
from tools.environment import EXTRAS, LOCK, locked_requirements, requirements_of

HEADER = (
    "# Every package of the environment (extras {extras}) in the version that the tests run with: "
    "CPython {python}, Linux, x86-64.\n"
    "# Written by `make lock`. Installed by {by}.\n"
)


def canonical(name: str) -> str:
    """A package's name as lock files spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: Sequence[str], constraints: Sequence[str]) -> list[str]:
    """``name==version`` of all that pip would install for ``requirements``, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        constraint_file, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraint_file.write_text("\n".join(constraints) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        command += ["--dry-run", "--ignore-installed", "--report", str(report), "-c", str(constraint_file)]
        subprocess.run([*command, *requirements], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # Without the local part (1.0+cpu): it would bind the lock to one place of download.
    return sorted(f"{canonical(item['name'])}=={item['version'].split('+')[0]}" for item in found)


def main(newest: Sequence[str]) -> None:
    """Resolve and write the locks; ``newest`` names the packages that are not held back, or ``all``."""
    write(
        LOCK, ["pip", *requirements_of(*EXTRAS, "gpu")], newest, (*EXTRAS, "gpu"), "`make env` and by docker/Dockerfile"
    )
    base = len(requirements_of())
    write(site.LOCK, requirements_of("docs")[base:], newest, ("docs",), "`make docs`")


def write(lock: Path, wanted: Sequence[str], newest: Sequence[str], extras: Sequence[str], by: str) -> None:
    """Resolve ``wanted`` and write one lock."""
    released = {canonical(name) for name in newest}
    kept = locked_requirements(lock) if lock.exists() and "all" not in released else []
    constraints = [line for line in kept if line.split("==")[0] not in released]
    lines = resolve(wanted, constraints)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lock.write_text(HEADER.format(extras=", ".join(extras), python=python, by=by) + "\n".join(lines) + "\n")
    changed = sorted(set(lines) ^ set(kept))
    print(f"{lock.name}: {len(lines)} packages; changed: {' '.join(changed) or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1:])

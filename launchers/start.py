"""Check the Python environment before a script of this folder imports anything else.

An old Python must be able to read this file, so it uses no package and nothing newer than Python 3.7.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "numpy", "omegaconf")  # by every command; the configuration decides what else is needed
EXIT_CODE = 69  # ServiceError
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
CHECKOUT = Path(__file__).resolve().parent.parent


def require_environment() -> None:
    """End the process with 69 and one line when this Python is too old or lacks the packages."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info < (3, 11):  # noqa: UP036
        reason = f"is Python {sys.version.split()[0]}, but 3.11 or newer is needed"
    elif missing:
        reason = f"lacks {', '.join(missing)}"
    else:
        return
    if all(os.environ.get(name, "0") == "0" for name in LOCAL_RANKS):  # the others of this node run the same Python
        print(f"ERROR[{EXIT_CODE}] {sys.executable} {reason}; do: {_advice()}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def _advice() -> str:
    """Return how to activate the environment, or how to create one."""
    activate = CHECKOUT / ".venv/bin/activate"
    if activate.exists():
        return f"source {activate}"
    where = CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else "the checkout"
    return f"make env and source .venv/bin/activate, or pip install -e '.[train]', in {where}"

"""List missing system packages and print the command that installs them.

Standard library only, because it must run before anything is installed.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _has_library(name: str) -> Callable[[], bool]:
    return lambda: ctypes.util.find_library(name) is not None


def _has_pkgconfig(name: str) -> Callable[[], bool]:
    return lambda: shutil.which("pkg-config") is not None and not subprocess.call(["pkg-config", "--exists", name])


@dataclass(frozen=True)
class Requirement:
    """One system package: its Debian name, what needs it, and a check that does not ask the package manager."""

    package: str
    needed_for: str
    is_present: Callable[[], bool]
    optional: bool = False  # needed by the demo and the tests only


REQUIREMENTS = (
    Requirement("g++", "building ffcv", lambda: shutil.which("g++") is not None),
    Requirement("python3-dev", "building ffcv", lambda: Path(sysconfig.get_path("include"), "Python.h").exists()),
    Requirement("pkg-config", "building ffcv", lambda: shutil.which("pkg-config") is not None),
    Requirement("libopencv-dev", "building ffcv", _has_pkgconfig("opencv4")),
    Requirement("libturbojpeg0-dev", "building ffcv", _has_pkgconfig("libturbojpeg")),
    Requirement("libgl1", "importing opencv", _has_library("GL")),
    Requirement("libglib2.0-0", "importing opencv", _has_library("glib-2.0")),
    Requirement("dataset-fashion-mnist", "the demo and the tests", FASHION_MNIST.is_dir, optional=True),
)


def missing_packages(include_optional: bool = True) -> list[Requirement]:
    """List the requirements that this machine does not meet."""
    return [r for r in REQUIREMENTS if not r.is_present() and (include_optional or not r.optional)]


def install_command(missing: list[Requirement]) -> list[str]:
    """Return the command that installs ``missing`` on Debian and Ubuntu."""
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    return [*sudo, "apt-get", "install", "-y", "--no-install-recommends", *(r.package for r in missing)]


def run() -> int:
    """Print one line per requirement, and the command that installs what is missing.

    Returns:
        The exit code: 0 when nothing is missing but optional packages, otherwise 69.
    """
    missing = missing_packages()
    for requirement in REQUIREMENTS:
        state = "MISSING" if requirement in missing else "ok"
        optional = " (optional)" if requirement.optional else ""
        print(f"{state:8}{requirement.package:24}{requirement.needed_for}{optional}")
    if sys.version_info < (3, 11):  # noqa: UP036  it also runs where nothing is installed yet
        print(f"MISSING Python 3.11 or newer, got {sys.version.split()[0]}")
        return 69
    if missing:
        print(f"\ninstall with:\n  {' '.join(install_command(missing))}")
    return 69 if any(not r.optional for r in missing) else 0

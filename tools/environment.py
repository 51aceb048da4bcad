"""Makes the environment of this checkout, with the standard library only: ``python3 tools/environment.py``.

The packages of requirements.lock (several GB), exactly these, live in one shared environment outside
the checkout, ``$TICKETWORKS_ENV_ROOT/env-<key>`` (by default under ``~/.cache/ticketworks``), where
``key`` is a hash of the lock and of the Python version: two checkouts with the same lock share it. The
checkout gets a thin ``.venv`` that sees the shared packages and puts the checkout itself first.

Another lock is used with ``TICKETWORKS_LOCK=FILE make test``, another Python with ``make test PYTHON=python3.12``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  (before an import that older Pythons lack)
    sys.exit(
        f"ERROR[69] Python 3.11 or newer is needed, this is {sys.version.split()[0]}; do: make PYTHON=python3.11 …"
    )
import tomllib

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))
from data_prep import doctor  # noqa: E402  (standard library only)

LOCK = CHECKOUT / (os.environ.get("TICKETWORKS_LOCK") or "requirements.lock")
EXTRAS = ("train", "dev")


def requirements_of(*extras: str) -> list[str]:
    """What pyproject.toml asks for: the base dependencies and those of ``extras``."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def locked_requirements(lock: Path = LOCK) -> list[str]:
    """``name==version`` of every package of a lock."""
    return [line for line in lock.read_text().split("\n") if line and not line.startswith("#")]


def shared_root() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("TICKETWORKS_ENV_ROOT") or Path(cache) / "ticketworks")


def environment_key(requirements: list[str]) -> str:
    content = json.dumps([sys.version, sys.platform, sorted(requirements)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def site_packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def install_system_packages() -> None:
    """Install what is missing. What only the demo and the tests need may be missing: its tests are skipped."""
    missing = doctor.missing_packages()
    if not missing:
        return
    command = doctor.install_command(missing)
    print(f"installing system packages: {' '.join(command)}", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run([*command[: command.index("apt-get")], "apt-get", "update", "-qq"], check=True, env=environ)
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        still_missing = ", ".join(requirement.package for requirement in missing)
        if not all(requirement.optional for requirement in missing):
            sys.exit(f"ERROR[69] missing system packages, and apt-get failed: {still_missing}; do: install them")
        print(f"{still_missing}: not installed; the demo and some tests need it", flush=True)


def shared_environment(root: Path, requirements: list[str], *, is_complete: bool = False) -> Path:
    """Create (one process at a time) or reuse the environment of ``requirements``.

    Args:
        root: Folder of the shared environments.
        requirements: As pip reads them.
        is_complete: They are all packages that are needed: pip adds no dependencies of theirs.
    """
    environment = root / f"env-{environment_key(requirements)}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (environment / ".complete").exists():
            return environment
        shutil.rmtree(environment, ignore_errors=True)
        started = time.monotonic()
        print(f"installing {len(requirements)} packages into {environment}, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(environment / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        pip_itself = [line for line in requirements if line.startswith("pip==")] or ["pip"]
        subprocess.run([*pip, "--upgrade", *pip_itself], check=True)
        subprocess.run([*pip, *["--no-deps"] * is_complete, *requirements], check=True)
        (environment / ".complete").write_text("\n".join(requirements) + "\n")
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
        return environment


def link_checkout(environment: Path) -> None:
    """Make a thin ``.venv`` of the checkout's own.

    It finds the checkout first, then the shared packages (a .pth file), and has the shared console
    scripts under its own interpreter.
    """
    venv = CHECKOUT / ".venv"
    stamp = venv / ".environment"
    if stamp.exists() and stamp.read_text() == str(environment):
        return
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    shared = str(site_packages(environment))
    link = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\nimport site; site.addsitedir({shared!r})\n"
    (site_packages(venv) / "_ticketworks.pth").write_text(link)
    shared_python, own_python = str(environment / "bin/python"), str(venv / "bin/python")
    for script in (environment / "bin").iterdir():
        target = venv / "bin" / script.name
        if target.exists() or script.is_symlink() or not script.is_file():
            continue
        content = script.read_bytes()
        if content.startswith(b"#!" + shared_python.encode()):
            target.write_bytes(content.replace(shared_python.encode(), own_python.encode(), 1))
            target.chmod(0o755)
        elif not script.name.lower().startswith(("python", "pip", "activate")):
            target.symlink_to(script)  # compiled tools: ruff, ninja, kubectl
    stamp.write_text(str(environment))


def main() -> None:
    install_system_packages()
    link_checkout(shared_environment(shared_root(), locked_requirements(), is_complete=True))


if __name__ == "__main__":
    main()

"""requirements.lock: it fits pyproject.toml, it is complete, and it is what this environment holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.environment import CHECKOUT, EXTRAS, LOCK, environment_key, locked_requirements, requirements_of
from tools.lock import canonical

LOCKED = dict(line.split("==") for line in locked_requirements())
is_another_lock = pytest.mark.skipif("TICKETWORKS_LOCK" in os.environ, reason="runs with another lock")


def unmet(requirement: Requirement) -> str:
    """What the lock says against ``requirement``; empty when it fits."""
    name = canonical(requirement.name)
    if name not in LOCKED:
        return f"{requirement} is not locked"
    return "" if requirement.specifier.contains(LOCKED[name], prereleases=True) else f"{requirement}: {LOCKED[name]}"


def test_every_line_is_a_package_with_its_exact_version_and_no_address() -> None:
    lines = locked_requirements()
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines)
    assert lines == sorted(lines)
    assert len(LOCKED) == len(lines)
    assert "://" not in LOCK.read_text()


@is_another_lock
def test_the_lock_fits_pyproject() -> None:
    assert [why for line in requirements_of(*EXTRAS, "gpu") if (why := unmet(Requirement(line)))] == []


def test_the_environment_holds_exactly_the_locked_versions() -> None:
    here = {name: importlib.metadata.version(name) for name in LOCKED}
    assert {name: version for name, version in here.items() if Version(version).public != LOCKED[name]} == {}


@is_another_lock
def test_the_lock_is_complete() -> None:
    """Every package that a locked package requires here is locked in a version that fits."""
    todo = [Requirement(line) for line in requirements_of(*EXTRAS, "gpu")]
    seen: set[str] = set()
    problems: list[str] = []
    while todo:
        requirement = todo.pop()
        problems += filter(None, [unmet(requirement)])
        if str(requirement) in seen or problems:
            continue
        seen.add(str(requirement))
        for line in importlib.metadata.requires(requirement.name) or []:
            below = Requirement(line)
            extras = {"", *requirement.extras}
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(below)
    assert problems == []
    assert set(LOCKED) - {canonical(Requirement(text).name) for text in seen} == {"pip"}


def test_the_key_of_the_environment_changes_with_any_version() -> None:
    lines = locked_requirements()
    assert environment_key(lines) == environment_key(list(reversed(lines)))
    assert environment_key(lines) != environment_key([*lines[:-1], lines[-1] + ".1"])


def test_the_base_needs_torch_and_numpy_only() -> None:
    assert requirements_of() == ["torch>=2.4", "numpy>=1.26"]


def test_nothing_suggests_that_the_project_is_on_an_index() -> None:
    """It is installed from its folder: ``pip install -e '.[extra]'``."""
    suffixes = (".py", ".md", ".yaml", ".yml", ".toml")
    folders = ("pipeline", "launchers", "data_prep", "configs", "docs", "docker", "k8s", "benchmarks", "tools")
    files = [path for folder in folders for path in Path(CHECKOUT, folder).rglob("*") if path.suffix in suffixes]
    files += CHECKOUT.glob("*.md")
    assert [str(path) for path in files if re.search(r"install[^\n]{0,20}ticketworks", path.read_text())] == []

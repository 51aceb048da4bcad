"""Data for the small jobs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.small_runs import arguments
from tests.end_to_end.small_job import make_data
from tests.support.ranks import RankServer


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.beton`` and ``val.beton``."""
    output = tmp_path_factory.mktemp("beton")
    make_data(tmp_path_factory.mktemp("idx"), output)
    return output


def can_mount() -> bool:
    """May this user make mount namespaces?"""
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="package")
def server(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """Ranks at a second's notice, in a mount namespace of their own where that is allowed."""
    folder = tmp_path_factory.mktemp("server")
    prefix = ["unshare", "--mount"] if can_mount() else []
    with RankServer.running(arguments(data, folder / "run"), prefix=prefix, log=folder / "log") as running:
        yield running

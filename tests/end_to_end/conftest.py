"""Data and ranks for the small jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.small_runs import arguments
from tests.end_to_end.fault_runs import Runs
from tests.end_to_end.small_job import make_data
from tests.support.launch import can_mount
from tests.support.packages import require_fashion_mnist
from tests.support.ranks import RankServer


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.beton`` and ``val.beton``."""
    require_fashion_mnist()
    output = tmp_path_factory.mktemp("beton")
    make_data(tmp_path_factory.mktemp("idx"), output)
    return output


@pytest.fixture(scope="package")
def server(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """A server that starts ranks in a second, in its own mount namespace if that is allowed."""
    folder = tmp_path_factory.mktemp("server")
    prefix = ["unshare", "--mount"] if can_mount() else []
    with RankServer.running(arguments(data, folder / "run"), prefix=prefix, log=folder / "log") as running:
        yield running


@pytest.fixture
def runs(server: RankServer, data: Path, tmp_path: Path) -> Runs:
    return Runs(server, data, tmp_path)

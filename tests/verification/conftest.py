"""One small run, and its bundle, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.tampering import make_bundle, train_small


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 14 steps: reports every 3, checkpoints every 4 and with the last ticket."""
    return train_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="package")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked bundle; the file is beside it."""
    return make_bundle(run, tmp_path_factory.mktemp("bundle"))

"""Images and a configuration for sweeps of small runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import sweeps


@pytest.fixture(scope="session")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small.yaml``, beside its images."""
    return sweeps.make_configuration(tmp_path_factory.mktemp("images"))

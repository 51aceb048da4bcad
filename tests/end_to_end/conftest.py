"""Data for the small jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.small_job import make_data


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.beton`` and ``val.beton``."""
    output = tmp_path_factory.mktemp("beton")
    make_data(tmp_path_factory.mktemp("idx"), output)
    return output

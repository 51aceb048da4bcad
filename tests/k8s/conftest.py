"""The manifests, rendered by kustomize."""

from __future__ import annotations

import pytest

from tests.support.manifests import OVERLAYS, Document, jobs_of, render_overlay


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """The name of each overlay."""
    return str(request.param)


@pytest.fixture(scope="session")
def manifests(overlay: str) -> list[Document]:
    """All objects of each overlay."""
    return render_overlay(overlay)


@pytest.fixture
def jobs(manifests: list[Document]) -> dict[str, Document]:
    """The specifications of the Jobs, by component."""
    return jobs_of(manifests)

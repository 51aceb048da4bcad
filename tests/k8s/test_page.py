"""The commands of docs/kubernetes.md: kubectl knows their options, and the folders that they name render."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.manifests import MANIFESTS, OVERLAYS, STAGES

CHECKOUT = MANIFESTS.parent
PAGE = (CHECKOUT / "docs/kubernetes.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NOBODY = "--server=http://127.0.0.1:1"  # no API server: a command that kubectl can read fails to connect


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
    return [line for line in lines if line.startswith("kubectl ") and "config set-context" not in line]


def test_kubectl_can_read_every_command(tmp_path: Path) -> None:
    assert len(commands()) > 10
    variables = {"OVERLAY": "k8s/overlays/smoke", "RUN": "fashion-mnist-s90", "KUBECONFIG": str(tmp_path / "none")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in dict.fromkeys(commands()):
        command = command.replace("/another", "/run")  # which the page makes by copying
        done = subprocess.run(
            ["bash", "-c", command.replace("kubectl ", f"kubectl {NOBODY} ", 1)],
            env={**os.environ, **variables, "PATH": path},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "127.0.0.1:1" in done.stderr and "refused" in done.stderr, f"{command}: {done.stderr}"


def test_every_folder_is_on_the_page() -> None:
    for name in OVERLAYS:
        assert f"`k8s/overlays/{name}`" in PAGE
    for stage in STAGES:
        assert f"kubectl apply -k $OVERLAY/{stage}" in PAGE

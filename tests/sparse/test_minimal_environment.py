"""The loop in docs/methods.md runs where only torch and numpy are installed.

With the oldest supported torch, and with the torch of this environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest

from tools.environment import shared_environment, shared_root, site_packages

ROOT = Path(__file__).parents[2]
OLDEST = ["torch==2.4.0", "numpy==1.26.4"]  # 3 GB to download, once: the registry has no smaller build of this torch
OF_THE_PROJECT = {
    f"pipeline{module}"
    for module in ("", ".errors", ".lazy", ".limits", ".moved", ".numbers", ".redaction", ".schedules")
} | {
    f"pipeline.distributed{module}"
    for module in ("", ".device", ".gpus", ".machine", ".peer_failure", ".rank_variables", ".session", ".store")
}

# A convolution of 4·3·3·3 = 108 weights and a linear layer of 10·4 = 40: of 148, density 0.1 leaves round(14.8) = 15.
SCRIPT = """
import json, sys
import torch
from torch import nn

def train(model, optimizer, loader, loss_function):
{loop}
    return sparsifier

results = []
for is_fused in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=is_fused)
    loader = [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(200)]  # RigL updates after 100 steps
    at_start = {{name: parameter.detach().clone() for name, parameter in model.named_parameters()}}
    sparsifier = train(model, optimizer, loader, nn.functional.cross_entropy)
    weights = {{name: weight.detach() for name, weight in sparsifier.weights.items()}}
    momenta = {{name: optimizer.state[weight]["momentum_buffer"] for name, weight in sparsifier.weights.items()}}
    inactive = {{name: ~mask for name, mask in sparsifier.masks.items()}}
    results.append({{
        "sparse": list(weights),
        "num_active": sum(int(mask.sum()) for mask in sparsifier.masks.values()),
        "num_updates": sparsifier.update_index,
        "has_explored": sparsifier.r_s > sparsifier.density,
        "is_zero_where_inactive": not any(
            tensors[name][inactive[name]].any() for tensors in (weights, momenta) for name in inactive
        ),
        "unchanged": [name for name, parameter in model.named_parameters() if torch.equal(parameter, at_start[name])],
    }})
print(json.dumps({{"torch": torch.__version__, "modules": sorted(sys.modules), "results": results}}))
"""


def ten_lines() -> str:
    section = (ROOT / "docs/methods.md").read_text().split("\n## In a loop of your own\n")[1].split("\n## ")[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    assert "Sparsifier(" in found[1]
    return found[1]


def distributions_of(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """Find these packages and everything that they require on this platform."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            distribution = found[name] if name in found else importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # meant for another platform or Python
        if name not in found:
            found[name] = distribution
            todo += [re.split(r"[^\w.-]", line)[0] for line in distribution.requires or [] if "extra ==" not in line]
    return found


def environment_with(folder: Path, *names: str) -> Path:
    """Make a virtual environment in ``folder`` that links to these packages of the current one.

    It also links to everything that they require.
    """
    venv.create(folder, symlinks=True)
    for distribution in distributions_of(*names).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = site_packages(folder) / top
            if not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run_the_loop(environment: Path, script: Path) -> dict[str, Any]:
    """Run the script; returns its numbers, after checks that hold for every version of torch."""
    script.write_text(SCRIPT.format(loop=textwrap.indent(ten_lines(), "    ")))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(
        [str(environment / "bin/python"), str(script)], capture_output=True, text=True, cwd=script.parent, env=environ
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert isinstance(seen, dict)
    assert len(seen["results"]) == 2
    for result in seen["results"]:
        assert result == {
            "sparse": ["0.weight", "5.weight"],
            "num_active": 15,
            "num_updates": 1,
            "has_explored": True,
            "is_zero_where_inactive": True,
            "unchanged": [],
        }
    project = {name for name in seen["modules"] if name.split(".")[0] == "pipeline"}
    assert "pipeline.sparse.sparsifier" in project
    assert {name for name in project if not name.startswith("pipeline.sparse")} <= OF_THE_PROJECT
    return seen


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="torch 2.4 has no build for this Python")
@pytest.mark.timeout(1800)  # it is downloaded the first time
def test_the_loop_of_the_page_runs_on_torch_2_4_and_numpy_1(tmp_path: Path) -> None:
    seen = run_the_loop(shared_environment(shared_root(), OLDEST), tmp_path / "loop.py")
    assert seen["torch"].startswith("2.4.0")


def test_the_loop_of_the_page_runs_on_this_torch_and_numpy(tmp_path: Path) -> None:
    seen = run_the_loop(environment_with(tmp_path / "environment", "torch", "numpy"), tmp_path / "loop.py")
    assert seen["torch"].split("+")[0] == importlib.metadata.version("torch").split("+")[0]
    packages = {name.split(".")[0] for name in seen["modules"]}
    assert {"torch", "numpy"} <= packages
    assert not {"torchvision", "deepspeed", "ffcv", "mlflow", "omegaconf", "safetensors", "psutil", "numba"} & packages

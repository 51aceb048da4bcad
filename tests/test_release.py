"""A wheel and an sdist are built, hold what they must, and work where only declared packages are installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline import __version__
from tests.sparse.test_minimal_environment import environment_with
from tools.environment import shared_environment, shared_root, site_packages

ROOT = Path(__file__).parents[1]
BUILDERS = ["build==1.6.1", "hatchling==1.33.0"]

SMOKE = """
import torch, pipeline
from pipeline.inference import load_ticket, save_ticket
from pipeline.models import build
from pipeline.sparse import Sparsifier, timetable

torch.manual_seed(0)
model = build("cifar_resnet8", num_classes=3, args={"width": 4})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
updates = timetable("rigl", num_steps=300)
sparsifier = Sparsifier(model, optimizer, "rigl", density=0.2, seed=0)
for step in (0, 99):  # RigL updates after 100 steps
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    if sparsifier.before_step(updates.at(step)):
        optimizer.step()
    sparsifier.after_step()
    optimizer.zero_grad()
save_ticket(model, sparsifier, "mine.safetensors", classes=["a", "b", "c"])
images = torch.randn(2, 3, 32, 32)
assert torch.equal(load_ticket("mine.safetensors")(images), model.eval()(images))
assert sparsifier.update_index == 1
print(pipeline.__version__, pipeline.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist of the committed and uncommitted files, and the wheel from the sdist; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    try:
        python = shared_environment(shared_root(), BUILDERS) / "bin/python"
    except subprocess.CalledProcessError:  # of pip
        pytest.skip("the package cannot be built here: pip install build hatchling")
    command = [str(python), "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_sdist_holds_the_checkout_and_nothing_that_git_ignores(built: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("this is no checkout of git")
    with tarfile.open(built / f"ticketworks-{__version__}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()} <= held
    assert not {name.split("/")[0] for name in held} & {".venv", "data", "runs", "site", "dist"}


def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """A loop with a ticket where only torch, numpy and safetensors are; the recipes where all packages are."""
    environment = environment_with(tmp_path / "environment", "torch", "numpy", "safetensors")
    python, wheel = environment / "bin/python", built / f"ticketworks-{__version__}-py3-none-any.whl"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, str(wheel)], check=True, cwd=tmp_path)

    def output(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], capture_output=True, text=True, cwd=tmp_path, env={})
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert output("-c", SMOKE).split() == [__version__, f"{site_packages(environment)}/pipeline/__init__.py"]
    assert "cifar_resnet8" in output("-m", "pipeline.tickets", "show", "mine.safetensors")
    packages = Path(str(importlib.metadata.distribution("omegaconf").locate_file("")))
    (site_packages(environment) / "other.pth").write_text(f"{packages}\n")
    plan = output("-m", "launchers.train", "--config", "fashion_mnist_s90", "--print-plan")
    assert "refinement-3" in plan

"""docker/Dockerfile, as far as it can be tested without building it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from data_prep import doctor

CHECKOUT = Path(__file__).resolve().parents[2]
SHIM = CHECKOUT / "docker/opencv"


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """The instructions of each stage, one line each."""
    text = (CHECKOUT / "docker/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    instructions = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    found: dict[str, list[str]] = {}
    for instruction in instructions:
        if instruction.startswith("FROM "):
            assert (
                instruction.split()[1] == "python:3.11-slim-bookworm"
            )  # OpenCV's library packages are named for this Debian
            found[instruction.split()[-1]] = []
        else:
            found[list(found)[-1]].append(instruction)
    return found


def environment(stage: list[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in stage if line.startswith("ENV ") for pair in line.split()[1:])


def test_the_last_stage_is_the_one_for_training(stages: dict[str, list[str]]) -> None:
    assert list(stages) == ["builder", "mlflow", "runtime"]


def test_it_runs_as_the_user_of_the_manifests(stages: dict[str, list[str]], manifests: list[dict[str, Any]]) -> None:
    pods = [d["spec"]["template"]["spec"] for d in manifests if "template" in d.get("spec", {})]
    ours = [pod for pod in pods if "ticketworks" in pod["containers"][0]["image"]]
    (user,) = {f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" for pod in ours}
    assert all(user in stages[name] for name in ("mlflow", "runtime"))


def test_nothing_is_compiled_at_run_time(stages: dict[str, list[str]]) -> None:
    runtime = " ".join(stages["runtime"])
    assert "g++" in " ".join(stages["builder"])
    assert not re.search(r"g\+\+|gcc|build-essential|-dev\b", runtime)
    needed = [r.package for r in doctor.REQUIREMENTS if not r.needed_for.startswith("building")]
    assert set(needed) <= set(runtime.split())


def test_caches_go_where_a_read_only_root_can_be_written(stages: dict[str, list[str]]) -> None:
    variables = environment(stages["runtime"])
    for name in (
        "HOME",
        "XDG_CACHE_HOME",
        "NUMBA_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "TORCH_HOME",
        "TORCH_EXTENSIONS_DIR",
        "MPLCONFIGDIR",
    ):
        assert variables[name].startswith("/tmp"), name


def test_server_and_client_are_of_the_locked_version(stages: dict[str, list[str]]) -> None:
    for stage, locked in (("mlflow", "-c /tmp/requirements.lock mlflow "), ("builder", "-c requirements.lock -r ")):
        (install,) = (line for line in stages[stage] if "pip install" in line and "--no-deps" not in line)
        assert locked in install
    assert re.search(r"(?m)^mlflow==", (CHECKOUT / "requirements.lock").read_text())


def test_the_image_installs_what_the_pipeline_needs(stages: dict[str, list[str]], tmp_path: Path) -> None:
    (install,) = (line for line in stages["builder"] if "/tmp/requirements.txt" in line)
    listed = subprocess.check_output(
        ["bash", "-c", install.removeprefix("RUN ").split(">")[0]], text=True, cwd=CHECKOUT
    ).splitlines()
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert listed == [*project["dependencies"], *extras["train"], *extras["gpu"]]


def test_what_is_copied_is_there_and_not_ignored(stages: dict[str, list[str]]) -> None:
    kept = [line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    packages = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copies = [line.split()[1:-1] for stage in stages.values() for line in stage if line.startswith("COPY ")]
    copied = [name for names in copies for name in names if not name.startswith("-") and not name.startswith("/")]
    assert {*copied, *packages, "configs", "README.md", "LICENSE"} - {"."} <= set(kept)
    assert not [name for name in kept if not (CHECKOUT / name).exists()]


def test_the_shim_asks_for_two_modules_of_opencv_only(tmp_path: Path) -> None:
    def output(*command: str) -> str:
        return subprocess.check_output(command, text=True, env={**os.environ, "PKG_CONFIG_PATH": str(SHIM)})

    assert output("pkg-config", "--libs-only-l", "opencv4").split() == ["-lopencv_imgproc", "-lopencv_core"]
    source = tmp_path / "as_ffcv.cpp"
    source.write_text("#include <opencv2/opencv.hpp>\n")
    headers = output("g++", "-M", *output("pkg-config", "--cflags", "opencv4").split(), str(source))
    modules = set(re.findall(r"/opencv4/opencv2/(\w+)[/.]", headers))
    assert modules == {"core", "imgproc", "opencv_modules"}

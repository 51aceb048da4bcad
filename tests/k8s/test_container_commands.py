"""Our own parsers accept every container command of our code; the training command passes --check."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import build_parser
from launchers import run, train_cli

CHECKOUT = Path(__file__).resolve().parents[2]
Spec = dict[str, Any]


def container(job: Spec, name: str) -> Spec:
    pod = job["template"]["spec"]
    (found,) = (c for c in [*pod.get("initContainers", []), *pod["containers"]] if c["name"] == name)
    return dict(found)


def command(job: Spec, name: str) -> list[str]:
    return [*container(job, name)["command"], *container(job, name)["args"]]


def mounts(job: Spec, name: str) -> dict[Path, tuple[str, bool]]:
    """Return for each mount path its volume, and whether it is read-only."""
    return {
        Path(mount["mountPath"]): (mount["name"], mount.get("readOnly", False))
        for mount in container(job, name)["volumeMounts"]
    }


def supervised(job: Spec) -> tuple[Any, Any]:
    """Return the options of launchers.run and of launchers/train.py."""
    assert command(job, "train")[:3] == ["python", "-m", "launchers.run"]
    options = run.parse(command(job, "train")[3:])
    assert options.command[0] == "launchers/train.py"
    return options, train_cli.parse(options.command[1:])


def data_prep(job: Spec, name: str) -> Any:
    assert command(job, name)[:3] == ["python", "-m", "data_prep"]
    return build_parser().parse_args(command(job, name)[3:])


@pytest.mark.parametrize(
    ("folder", "nodes", "ranks", "gpus"),
    [("base", 1, 1, 1), ("overlays/smoke", 1, 2, None), ("overlays/multi-node-gpu", 4, 8, 8)],
)
def test_counts_agree(
    render: Callable[[str], list[Spec]], folder: str, nodes: int, ranks: int, gpus: int | None
) -> None:
    (job,) = (d["spec"] for d in render(folder) if (d["kind"], d["metadata"]["name"]) == ("Job", "train"))
    options, _ = supervised(job)
    assert (job["completions"], job["parallelism"], options.nnodes) == (nodes, nodes, nodes)
    assert job["backoffLimit"] % nodes == 0  # restarts × nodes
    assert options.nproc_per_node == ranks
    assert container(job, "train")["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_node_0_is_the_master_and_every_node_has_time_to_save(jobs: dict[str, Spec]) -> None:
    options, _ = supervised(jobs["train"])
    pod = jobs["train"]["template"]["spec"]
    assert options.master_addr == f"train-0.{pod['subdomain']}"
    assert options.master_port in [port["containerPort"] for port in container(jobs["train"], "train")["ports"]]
    assert pod["terminationGracePeriodSeconds"] > options.shutdown_timeout > 30


def test_training_resumes_and_writes_to_shared_storage(jobs: dict[str, Spec]) -> None:
    _, training = supervised(jobs["train"])
    values = dict(override.split("=", 1) for override in training.overrides)
    assert training.resume == "auto"
    assert mounts(jobs["train"], "train")[Path(values["output_dir"]).parent] == ("runs", False)
    assert values["tracking.uri"] == "http://mlflow:5000"


def test_data_is_prepared_then_verified_then_staged_then_read(jobs: dict[str, Spec]) -> None:
    train = jobs["train"]
    assert [c["name"] for c in train["template"]["spec"]["initContainers"]] == ["preflight", "verify", "stage"]
    prepared = data_prep(jobs["data-prep"], "data-prep")
    files = [prepared.output / name for name in ("train.beton", "val.beton")]
    assert mounts(jobs["data-prep"], "data-prep")[prepared.output] == ("datasets", False)
    assert data_prep(train, "verify").files == files
    staging = data_prep(train, "stage")
    assert staging.files == files
    for name in ("verify", "stage"):
        assert mounts(train, name)[prepared.output] == ("datasets", True)

    target = staging.output
    assert mounts(train, "stage")[target] == ("data", False)
    assert mounts(train, "train")[target] == ("data", True)
    _, training = supervised(train)
    assert {f"data.train={target / 'train.beton'}", f"data.val={target / 'val.beton'}"} <= set(training.overrides)


def test_images_are_mounted_read_only_where_they_are_read(jobs: dict[str, Spec]) -> None:
    prepared = data_prep(jobs["data-prep"], "data-prep")
    for split in ("train", "val"):
        if hasattr(prepared, split):  # Fashion-MNIST is in the image
            assert mounts(jobs["data-prep"], "data-prep")[getattr(prepared, split).parent] == ("images", True)


def test_the_preflight_checks_what_the_training_runs(jobs: dict[str, Spec]) -> None:
    assert container(jobs["train"], "preflight")["command"] == ["python", "launchers/train.py", "--check"]
    assert container(jobs["train"], "preflight")["args"] == container(jobs["train"], "train")["args"]


@pytest.mark.parametrize("name", ["preflight", "train"])
def test_the_command_as_written_passes_its_check(jobs: dict[str, Spec], name: str) -> None:
    written = command(jobs["train"], name)
    arguments = written[
        written.index("launchers/train.py") :
    ]  # without the supervisor, which would wait for the other nodes
    checked = subprocess.run(
        [sys.executable, *arguments, *(["--check"] if name == "train" else [])], cwd=CHECKOUT, timeout=60, check=False
    )
    assert checked.returncode == 0

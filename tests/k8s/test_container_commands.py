"""Every container command that runs our code, read by our own parsers; the training command's check, run as written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, render

from data_prep.__main__ import build_parser
from launchers import cli, run

Pod = dict[str, Any]


def container(pod: Pod, name: str) -> dict[str, Any]:
    (found,) = (c for c in [*pod.get("initContainers", []), *pod["containers"]] if c["name"] == name)
    return dict(found)


def command(pod: Pod, name: str) -> list[str]:
    return [*container(pod, name)["command"], *container(pod, name)["args"]]


def supervised(pod: Pod) -> tuple[Any, Any]:
    """The options of launchers.run and of launchers/train.py."""
    python, module, name, *arguments = command(pod, "train")
    assert (python, module, name) == ("python", "-m", "launchers.run")
    options = run.parse(arguments)
    assert options.command[0] == "launchers/train.py"
    return options, cli.parse(options.command[1:])


@pytest.mark.parametrize(
    ("overlay", "nodes", "ranks", "gpus"), [("base", 1, 1, 1), ("overlays/smoke", 1, 2, None), ("overlays/multi-node-gpu", 4, 8, 8)]
)
def test_counts_agree(overlay: str, nodes: int, ranks: int, gpus: int | None) -> None:
    (job,) = (document for document in render(overlay) if document["kind"] == "Job" and document["metadata"]["name"] == "train")
    pod = job["spec"]["template"]["spec"]
    options, _ = supervised(pod)
    assert (job["spec"]["completions"], job["spec"]["parallelism"], options.nnodes) == (nodes, nodes, nodes)
    assert job["spec"]["backoffLimit"] % nodes == 0  # restarts × nodes
    assert options.nproc_per_node == ranks
    assert container(pod, "train")["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_node_0_is_the_master_and_has_time_to_save(train_pod: Pod) -> None:
    options, _ = supervised(train_pod)
    assert options.master_addr == f"train-0.{train_pod['subdomain']}"
    assert options.master_port in [port["containerPort"] for port in container(train_pod, "train")["ports"]]
    assert train_pod["terminationGracePeriodSeconds"] > options.shutdown_timeout > 30


def test_training_resumes_and_reads_and_writes_where_volumes_are(train_pod: Pod) -> None:
    _, training = supervised(train_pod)
    values = dict(override.split("=", 1) for override in training.overrides)
    mounts = {mount["mountPath"]: mount for mount in container(train_pod, "train")["volumeMounts"]}
    assert training.resume == "auto"
    assert mounts[str(Path(values["output_dir"]).parent)] == {"name": "runs", "mountPath": "/runs"}
    for key in ("data.train", "data.val"):
        mount = mounts[str(Path(values[key]).parent)]
        assert (mount["name"], mount["readOnly"]) == ("data", True)
        staged = {Path("/data", Path(argument).name) for argument in container(train_pod, "stage")["args"]}
        assert {Path(values[key]), Path(values[key] + ".json")} <= staged
    assert values["tracking.uri"] == "http://mlflow:5000"


def test_what_is_staged_was_verified(train_pod: Pod) -> None:
    assert [c["name"] for c in train_pod["initContainers"]] == ["preflight", "verify", "stage"]  # the cheapest first
    verified = build_parser().parse_args(command(train_pod, "verify")[3:]).files
    staged = [Path(argument) for argument in container(train_pod, "stage")["args"] if not argument.endswith(".json")]
    assert verified == staged
    (target,) = (m["mountPath"] for m in container(train_pod, "stage")["volumeMounts"] if m["name"] == "data")
    assert container(train_pod, "stage")["command"] == ["cp", "--verbose", f"--target-directory={target}"]


def test_the_preflight_checks_what_the_training_runs(train_pod: Pod) -> None:
    assert container(train_pod, "preflight")["command"] == ["python", "launchers/train.py", "--check"]
    assert container(train_pod, "preflight")["args"] == container(train_pod, "train")["args"]


@pytest.mark.parametrize("overlay", ["base", "overlays/smoke", "overlays/multi-node-gpu"])
def test_data_prep_writes_what_training_verifies(overlay: str) -> None:
    jobs = {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in render(overlay) if d["kind"] == "Job"}
    assert command(jobs["data-prep"], "data-prep")[:3] == ["python", "-m", "data_prep"]
    options = build_parser().parse_args(container(jobs["data-prep"], "data-prep")["args"])
    assert [options.output / name for name in ("train.beton", "val.beton")] == build_parser().parse_args(
        command(jobs["train"], "verify")[3:]
    ).files
    mounts = {mount["mountPath"]: mount for mount in container(jobs["data-prep"], "data-prep")["volumeMounts"]}
    assert mounts[str(options.output)] == {"name": "datasets", "mountPath": "/datasets"}
    if overlay != "overlays/smoke":
        assert [mounts[str(folder.parent)]["readOnly"] for folder in (options.train, options.val)] == [True, True]


@pytest.mark.parametrize("name", ["preflight", "train"])
def test_the_command_as_written_passes_its_check(train_pod: Pod, name: str, tmp_path: Path) -> None:
    written = command(train_pod, name)
    arguments = written[written.index("launchers/train.py") :]  # without the supervisor, which would wait for the other nodes
    checked = subprocess.run([sys.executable, *arguments, *(["--check"] if name == "train" else [])], cwd=CHECKOUT, timeout=60, check=False)
    assert checked.returncode == 0

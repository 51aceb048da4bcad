"""Our own parsers accept every container command of our code; the training command passes --check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep import doctor
from data_prep.__main__ import build_parser
from launchers import preflight, run, train_cli
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from tests.support.manifests import MANIFESTS, jobs_of, render, render_another

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


def preflight_options(job: Spec) -> Any:
    assert command(job, "preflight")[:3] == ["python", "-m", "launchers.preflight"]
    return preflight.parse(command(job, "preflight")[3:])


def data_prep(job: Spec, name: str) -> Any:
    assert command(job, name)[:3] == ["python", "-m", "data_prep"]
    return build_parser().parse_args(command(job, name)[3:])


@pytest.mark.parametrize(("overlay_of", "nodes", "ranks", "gpus"), [("smoke", 1, 2, None), ("multi-node-gpu", 4, 8, 8)])
def test_counts_agree(overlay_of: str, nodes: int, ranks: int, gpus: int | None) -> None:
    _assert_counts(jobs_of(render(MANIFESTS / "overlays" / overlay_of / "run"))["train"], nodes, ranks, gpus)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 4), (3, 8), (16, 1)])
def test_nodes_and_gpus_are_two_fields(nodes: int, gpus: int, tmp_path: Path) -> None:
    settings = {"nodes": str(nodes), "ranks_per_node": str(gpus), "restarts": "7"}
    job = jobs_of(render_another(tmp_path, "multi-node-gpu", **settings))["train"]
    _assert_counts(job, nodes, gpus, gpus)
    assert (job["backoffLimitPerIndex"], job["maxFailedIndexes"]) == (7, 0)


def _assert_counts(job: Spec, nodes: int, ranks: int, gpus: int | None) -> None:
    options, _ = supervised(job)
    assert (job["completions"], job["parallelism"], options.nnodes) == (nodes, nodes, nodes)
    assert options.nproc_per_node == ranks
    assert container(job, "train")["resources"]["limits"].get("nvidia.com/gpu") == gpus
    for name in ("preflight", "train"):
        variables = {variable["name"]: variable["value"] for variable in container(job, name)["env"]}
        assert (variables["NODES"], variables["RANKS_PER_NODE"]) == (str(nodes), str(ranks))


def test_node_0_is_the_master_and_every_node_has_time_to_save(jobs: dict[str, Spec]) -> None:
    options, _ = supervised(jobs["train"])
    pod = jobs["train"]["template"]["spec"]
    assert options.master_addr == f"{pod['subdomain']}-0.{pod['subdomain']}"
    assert options.master_port in [port["containerPort"] for port in container(jobs["train"], "train")["ports"]]
    assert pod["terminationGracePeriodSeconds"] > options.shutdown_timeout > 30
    assert options.restarts > 0  # in place, so that the Job sees one failed pod, not all
    assert options.wait == 86400


def test_training_resumes_and_writes_to_shared_storage(jobs: dict[str, Spec]) -> None:
    _, training = supervised(jobs["train"])
    values = dict(override.split("=", 1) for override in training.overrides)
    assert training.resume == "auto"
    assert mounts(jobs["train"], "train")[Path(values["output_dir"]).parent] == ("runs", False)
    assert values["tracking.uri"] == "http://mlflow:5000"


def test_data_is_prepared_then_checked_then_staged_then_read(jobs: dict[str, Spec]) -> None:
    train = jobs["train"]
    assert [c["name"] for c in train["template"]["spec"]["initContainers"]] == ["preflight", "stage"]
    prepared = data_prep(jobs["data-prep"], "data-prep")
    files = [prepared.output / name for name in ("train.beton", "val.beton")]
    assert mounts(jobs["data-prep"], "data-prep")[prepared.output] == ("datasets", False)
    assert preflight_options(train).data_from == prepared.output
    staging = data_prep(train, "stage")
    assert staging.files == files
    for name in ("preflight", "stage"):
        assert mounts(train, name)[prepared.output] == ("datasets", True)

    target = staging.output
    assert mounts(train, "stage")[target] == ("data", False)
    assert mounts(train, "train")[target] == ("data", True)
    _, training = supervised(train)
    assert {f"data.train={target / 'train.beton'}", f"data.val={target / 'val.beton'}"} <= set(training.overrides)


def test_images_are_mounted_read_only_where_they_are_read(jobs: dict[str, Spec]) -> None:
    prepared = data_prep(jobs["data-prep"], "data-prep")
    if prepared.source == Path("/images"):
        assert mounts(jobs["data-prep"], "data-prep")[prepared.source] == ("images", True)
    else:
        assert prepared.source == doctor.FASHION_MNIST  # in the image


def test_the_preflight_checks_what_the_training_runs(jobs: dict[str, Spec]) -> None:
    options, training = supervised(jobs["train"])
    checked = preflight_options(jobs["train"])
    for name in ("nnodes", "nproc_per_node", "master_addr", "master_port", "command"):
        assert getattr(checked, name) == getattr(options, name)
    containers_of = [container(jobs["train"], name) for name in ("preflight", "train")]
    gpus = [one["resources"]["limits"].get("nvidia.com/gpu") for one in containers_of]
    assert gpus[0] == gpus[1]
    values = dict(override.split("=", 1) for override in training.overrides)
    written = mounts(jobs["train"], "preflight")
    assert written[Path(values["output_dir"]).parent] == ("runs", False)
    assert written[Path("/dev/shm")] == mounts(jobs["train"], "train")[Path("/dev/shm")]


@pytest.mark.parametrize(("nodes", "code"), [(1, 0), (2, 0), (3, 64), (4, 0)])
def test_the_configuration_is_checked_for_the_number_of_nodes(nodes: int, code: int, tmp_path: Path) -> None:
    documents = render_another(tmp_path / "k8s", "multi-node-gpu", nodes=str(nodes))
    start = started(documents, tmp_path)
    if code:
        with pytest.raises(ConfigError, match="1024 samples cannot be divided evenly among 24 ranks"):
            preflight.configuration(start)
    else:
        assert preflight.configuration(start).is_fine
    assert start.num_ranks == nodes * 8


def started(documents: list[Spec], folder: Path) -> preflight.Start:
    """Return what the container `preflight` checks."""
    settings = mounted_settings(documents, folder)
    written = [text.replace("/settings", str(settings)) for text in command(jobs_of(documents)["train"], "preflight")]
    options = preflight.parse(written[3:])
    arguments = train_cli.parse(options.command[1:])
    return preflight.Start(options, arguments, load_config(arguments.config, arguments.overrides))


def test_the_training_command_as_written_passes_its_check(manifests: list[Spec], tmp_path: Path) -> None:
    settings = mounted_settings(manifests, tmp_path)
    written = command(jobs_of(manifests)["train"], "train")
    arguments = written[written.index("launchers/train.py") :]  # without the supervisor, which waits for other nodes
    checked = [*(text.replace("/settings", str(settings)) for text in arguments[1:]), "--check"]
    assert train_cli.main(pytest.fail, checked) == 0


def mounted_settings(manifests: list[Spec], folder: Path) -> Path:
    """Write the run's ConfigMap into ``folder`` as the kubelet mounts it: files are links through ``..data``."""
    (settings,) = (document for document in manifests if document["kind"] == "ConfigMap")
    mount = folder / "settings"
    (mount / "..version").mkdir(parents=True)
    (mount / "..data").symlink_to("..version")
    for name, content in settings["data"].items():
        (mount / "..version" / name).write_text(content)
        (mount / name).symlink_to(f"..data/{name}")
    return mount


def test_a_run_has_the_configuration_of_its_settings(tmp_path: Path) -> None:
    """Own configurations need no new image: a base may be another entry of settings.yaml."""
    entries = {
        "config.yaml": "base: own.yaml\ntrain: {global_batch: 512}\n",
        "own.yaml": "base: imagenet_r50_s90.yaml\nseed: 7\n",
    }
    documents = render_another(tmp_path / "k8s", "multi-node-gpu", **entries)
    config = started(documents, tmp_path).config
    assert (config.train.global_batch, config.seed, config.sparsity.density) == (512, 7, 0.1)
    assert (config.name, config.output_dir) == ("imagenet-r50-s90", "/runs/imagenet-r50-s90")

"""Which device a rank uses, and what happens when it cannot, or when two ranks have one GPU.

torch.cuda is replaced, so that no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import device, gpus, group, session, store
from pipeline.distributed.device import Choice
from pipeline.errors import ConfigError, ServiceError, session_end_of


@dataclass
class Node:
    """What torch.cuda shows to one rank, and what was done with it."""

    shared: dist.HashStore = field(default_factory=dist.HashStore)
    visible: tuple[str, ...] = ()
    current: int | None = None
    backends: list[str] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)

    def join(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        rank: int,
        visible: tuple[str, ...],
        other: Choice | None = None,
        **options: Any,
    ) -> None:
        """Open the session of a rank of two on this node; the other one has posted its choice, by default a GPU."""
        self.visible = visible
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in {**environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(group, "open_store", lambda timeout_seconds: (self.shared, rank, 2))
        device.post(self.shared, 1 - rank, other or Choice("cuda", "A100 (80 GiB)", "CUDA 13.0"))
        with group.join(timeout_seconds=2, **options):
            self.devices.append(session.device())


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    node, cudnn, matmul = Node(), torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(node.visible))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(node.visible))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(node, "current", index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: node.current)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(uuid=f"GPU-{node.visible[index]}", name="A100", total_memory=80 << 30),
    )
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: node.backends.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    yield node
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("of_each", "expected"),
    [
        ([("a", "b"), ("a", "b")], [0, 1]),  # both GPUs are visible to both ranks
        ([("a",), ("b",)], [0, 0]),  # one per task: srun --gpus-per-task 1, or CUDA_VISIBLE_DEVICES
        ([("a", "b"), ("c", "d")], [0, 1]),  # two per task
        ([("a", "b", "c"), ("a", "b", "c")], [0, 1]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(
    node: Node, of_each: list[tuple[str, ...]], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, visible in enumerate(of_each):
        node.join(monkeypatch, rank=rank, visible=visible)
        assert node.current == expected[rank]
    assert node.backends == ["nccl", "nccl"]


def test_two_ranks_with_one_gpu_end_in_one_line(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.join(monkeypatch, rank=0, visible=("a",))
    says = (
        r"^rank 1 \(local rank 1\) has the GPU of rank 0: GPU-a; do: start at most one rank per GPU; with srun, --gpus"
    )
    with pytest.raises(ConfigError, match=says) as caught:
        node.join(monkeypatch, rank=1, visible=("a",))
    with pytest.raises(ConfigError, match=says):  # the other rank ends as well, and is not left waiting for NCCL
        store.require_own_gpus(node.shared)
    end = session_end_of(caught.value)
    assert end is not None and not end.is_reported_elsewhere
    assert node.backends == ["nccl"]


def test_with_gloo_two_ranks_share_a_gpu(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        node.join(monkeypatch, rank=rank, visible=("a",), backend="gloo")
    assert node.backends == ["gloo", "gloo"]
    assert node.devices == [torch.device("cuda", 0)] * 2  # and not the CPU, for which gloo would speak by itself


def test_a_run_on_the_cpu_leaves_the_gpus_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.join(monkeypatch, rank=0, visible=("a", "b"), other=Choice("cpu"), on="cpu")
    assert (node.current, node.backends, node.devices) == (None, ["gloo"], [torch.device("cpu")])


@pytest.mark.parametrize(("threads", "expected"), [(1, "1 thread per rank"), (8, "8 threads per rank")])
def test_a_cpu_is_said_with_its_threads(threads: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    choices = [device.choose("cpu", 0), Choice("cpu", "other CPU", expected)]
    assert device.summary(choices, "gloo").endswith(f", 1 × other CPU; {expected}")


def test_the_start_names_device_driver_and_libraries(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpus, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    with caplog.at_level("INFO", logger=group.__name__):
        node.join(monkeypatch, rank=0, visible=("a", "b"))
    software = "driver 580.65.06, CUDA 13.0, NCCL 2.27.3"
    assert caplog.messages == [f"device: 2 ranks on cuda (nccl): 2 × A100 (80 GiB); {software} or CUDA 13.0"]


@pytest.mark.parametrize(
    ("tf32", "is_deterministic", "expected"),
    [
        ("none", False, (False, False, True)),
        ("convolutions", False, (True, False, True)),
        ("all", True, (True, True, False)),
    ],
)
def test_arithmetic_of_a_gpu(
    node: Node,
    tf32: str,
    is_deterministic: bool,
    expected: tuple[bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "make_deterministic", lambda: None)  # would last
    node.join(monkeypatch, rank=0, visible=("a", "b"), tf32=tf32, is_deterministic=is_deterministic)
    cudnn = torch.backends.cudnn
    assert (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark) == expected


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this machine a ``/dev`` and a driver file of its own: two GPUs, driver 535."""
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC")
    return tmp_path


def test_gpus_that_torch_cannot_use_end_all_ranks_in_one_line(
    node: Node, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would otherwise go on silently on the CPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ServiceError) as caught:
        node.join(monkeypatch, rank=0, visible=(), other=Choice("cuda"))
    assert str(caught.value) == (
        f"no GPU can be used: torch {torch.__version__} (built for CUDA 13.0), on this machine {machine}/nvidia0, "
        f"{machine}/nvidia1, driver 535.104.05: The NVIDIA driver on your system is too old (found version 12020).; "
        "do: install an NVIDIA driver of series 580 or newer, or a torch for the driver that is there; "
        "train.device=cpu computes on the CPU"
    )
    end = session_end_of(caught.value)
    assert end is not None and not end.is_reported_elsewhere and node.backends == []
    with pytest.raises(ServiceError) as caught:  # the other rank ends as well, and leaves the message to that one
        device.require_one_kind(node.shared, 1, 2)
    assert caught.value.is_reported_elsewhere


def test_some_ranks_on_gpus_and_others_on_cpus_end_in_one_line(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    says = r"^rank 1 compute on GPUs, rank 0 on CPUs; expected one kind of device; do: set train\.device=cuda, which"
    with pytest.raises(ConfigError, match=says):
        node.join(monkeypatch, rank=0, visible=(), other=Choice("cuda"))
    assert node.backends == []


def test_nccl_without_a_gpu_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^the backend nccl needs GPUs, and there is none; do: set train\.backend"):
        node.join(monkeypatch, rank=0, visible=(), other=Choice("cpu"), backend="nccl")


@pytest.mark.parametrize(
    ("files", "wanted", "environ", "expected"),
    [
        (True, "auto", "", "cpu"),  # hidden on purpose
        (True, "auto", "-1", "cpu"),
        (False, "auto", None, "cpu"),
        (True, "cpu", None, "cpu"),
        (True, "auto", None, "cuda, no GPU can be used"),
        (True, "auto", "0,1", "cuda, no GPU can be used"),
        (True, "cuda", "", "cuda, no GPU can be used"),
        (False, "cuda", None, "cuda, no GPU can be used"),
    ],
)
def test_which_device_is_chosen_where_torch_sees_no_gpu(
    machine: Path, files: bool, wanted: str, environ: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not files:
        for path in machine.glob("nvidia*"):
            path.unlink()
    if environ is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environ)
    choice = device.choose(wanted, 0)
    assert f"{choice.kind}, {choice.problem}".startswith(expected) and (choice.problem == "") == (expected == "cpu")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("1", 1),
        ("0,1", 2),
        ("0,-1,1", 1),  # CUDA ignores what follows an invalid entry
        ("GPU-8932f937-d72c,GPU-2a3b", 2),
        ("MIG-4d8e,MIG-77aa", 1),  # a process can open one instance
    ],
)
def test_number_of_gpus(machine: Path, environ: str | None, expected: int) -> None:
    assert gpus.num_gpus({} if environ is None else {"CUDA_VISIBLE_DEVICES": environ}) == expected


def test_number_of_gpus_in_wsl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There one device file stands for all GPUs, and ``nvidia-smi`` counts them."""
    (tmp_path / "dxg").touch()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: RTX 4090 (UUID: GPU-1)'\necho 'GPU 1: RTX 4090 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus.num_gpus({}) == 2

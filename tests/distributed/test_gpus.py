"""Which GPU a rank uses, and what happens when two have the same. torch.cuda is replaced, so that no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import session, store
from pipeline.errors import ConfigError, session_end_of


@dataclass
class Node:
    """What torch.cuda shows to one rank, and what was done with it."""

    shared: dist.HashStore = field(default_factory=dist.HashStore)
    visible: tuple[str, ...] = ()
    current: int | None = None
    backends: list[str] = field(default_factory=list)

    def join(self, monkeypatch: pytest.MonkeyPatch, *, rank: int, visible: tuple[str, ...]) -> None:
        """Open the session of a rank of two on this node; the other one has set that it is here."""
        self.visible = visible
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        for name, value in {**environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(session, "open_store", lambda timeout_seconds: (self.shared, rank, 2))
        self.shared.set(f"rank {1 - rank} is here", "")
        with session.session(timeout_seconds=2):
            pass


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(node.visible))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(node, "current", index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: node.current)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{node.visible[index]}")
    )
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: node.backends.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return node


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

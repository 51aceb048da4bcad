"""The check of memory on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import DataConfig
from pipeline.datasets.memory import GIB, advise, memory_limit
from pipeline.datasets.sidecar import BetonInfo


def machine(root: Path, *, gib: int, cgroup: str = "", limits: dict[str, str] | None = None) -> Path:
    files = {
        "proc/meminfo": f"MemTotal: {gib * 2**20} kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": cgroup,
        **(limits or {}),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def file_of(gib: float) -> BetonInfo:
    return BetonInfo(Path("train.beton"), 1, ["a"], "jpg", 1, 1, "", {"size_bytes": int(gib * GIB)})


@pytest.mark.parametrize(
    ("cgroup", "limits", "gib"),
    [
        ("0::/\n", {}, 64),
        (
            "0::/job/step\n",
            {"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/job/memory.max": str(8 * GIB)},
            8,
        ),
        ("3:cpu:/\n2:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB)}, 4),
        (
            "2:memory:/pod\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            64,
        ),  # none, as version 1 says it
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, cgroup: str, limits: dict[str, str], gib: int) -> None:
    assert memory_limit(machine(tmp_path, gib=64, cgroup=cgroup, limits=limits))[0] == gib * GIB


def test_a_set_larger_than_memory_is_reported_with_advice(tmp_path: Path) -> None:
    root = machine(tmp_path, gib=64)
    random, window = DataConfig(), DataConfig(order="quasi_random", window_mb=4096)
    assert (
        advise(file_of(60), random, ranks_here=8, root=root) == []
    )  # 64 less half a GiB a rank, however many ranks read the file
    (line,) = advise(file_of(61), random, ranks_here=8, root=root)
    assert "train.beton has 61.0 GiB, but the machine's memory is 64.0 GiB for 8 ranks" in line
    assert "data.order=quasi_random" in line
    assert advise(file_of(300), window, ranks_here=8, root=root) == []
    window.window_mb = 40 * 1024
    (line,) = advise(file_of(300), window, ranks_here=8, root=root)
    assert "set data.window_mb=30720" in line  # half of what is left
    (line,) = advise(file_of(300), DataConfig(loader="folder"), ranks_here=8, root=root)
    assert "write it with python -m data_prep" in line


def test_this_machine_has_memory() -> None:
    assert memory_limit()[0] > 2**20

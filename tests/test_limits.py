"""How many CPUs a process may use: quotas of both versions of cgroups, made up and real, and OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import limits
from pipeline.distributed import group, rank_variables
from pipeline.limits import cpu_quota, loader_threads, omp_threads, threads_of_rank, usable_cpus

ROOT = Path(__file__).parents[1]


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v1(level: str, quota: object, period: object = 100000) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{level}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def v2(level: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{level}/cpu.max": f"{text}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        pytest.param("0::/\n", {}, None, id="no files"),
        pytest.param("0::/\n", v2("", "max 100000"), None, id="v2 without a quota"),
        pytest.param("0::/\n", v2("", "300000 100000"), 3, id="v2 mount of a container"),
        pytest.param("0::/pod/box\n", v2("pod/box", "max 100000") | v2("pod", "200000 100000"), 2, id="v2 of a parent"),
        pytest.param("0::/a/b\n", v2("a/b", "400000 100000") | v2("a", "600000 50000"), 4, id="v2 smallest below"),
        pytest.param("0::/a/b\n", v2("a/b", "900000 100000") | v2("", "500000 100000"), 5, id="v2 smallest at the top"),
        pytest.param("0::/docker/0123\n", v2("", "200000 100000"), 2, id="v2 group not visible in its container"),
        pytest.param("0::/../job\n", v2("", "200000 100000"), 2, id="v2 outside its namespace"),
        pytest.param("0::/a:b\n", v2("a:b", "200000 100000"), 2, id="v2 colon in the name"),
        pytest.param("0::/\n", v2("", "150000 100000"), 1, id="v2 one and a half"),
        pytest.param("0::/\n", v2("", "25000 100000"), 1, id="v2 a quarter"),
        pytest.param("3:cpu:/\n0::/\n", v1("cpu", -1), None, id="v1 without a quota"),
        pytest.param("3:cpu:/\n0::/\n", v1("cpu", 250000), 2, id="v1"),
        pytest.param("3:cpu:/\n", v1("cpu", 100000, 25000), 4, id="v1 with another period"),
        pytest.param("3:cpu:/x/y\n", v1("cpu/x/y", -1) | v1("cpu/x", 300000) | v1("cpu", 700000), 3, id="v1 nested"),
        pytest.param("3:cpu,cpuacct:/x\n", v1("cpu,cpuacct/x", 200000), 2, id="v1 mounted with cpuacct"),
        pytest.param("3:cpuset:/\n2:cpuacct:/\n", v1("cpu", 200000), None, id="v1 other controllers"),
        pytest.param("3:cpu:/\n0::/\n", v1("cpu", 600000) | v2("unified", "200000 100000"), 2, id="both versions"),
        pytest.param("0::/\n", v2("", ""), None, id="empty"),
        pytest.param("0::/\n", v2("", "200000"), None, id="no period"),
        pytest.param("0::/\n", v2("", "200000 0"), None, id="period of zero"),
        pytest.param("0::/\n", v2("", "lots of it"), None, id="words"),
        pytest.param("0::/\n", v2("", "2e5 100000"), None, id="not a whole number"),
        pytest.param("0::/a\n", v2("a", "??") | v2("", "200000 100000"), 2, id="odd file below a sound one"),
        pytest.param("3:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000"}, None, id="v1 file missing"),
        pytest.param("nonsense\n\n0::/\n", v2("", "200000 100000"), 2, id="odd line in /proc"),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, cgroup: str, files: dict[str, str], cpus: int | None) -> None:
    assert cpu_quota(machine(tmp_path, cgroup, files)) == cpus


def test_affinity_and_quota_both_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert usable_cpus(tmp_path) == 6 and cpu_quota(tmp_path) is None  # no /proc
    assert usable_cpus(machine(tmp_path, "0::/\n", v2("", "400000 100000"))) == 4
    assert usable_cpus(machine(tmp_path, "0::/\n", v2("", "800000 100000"))) == 6


def test_threads_of_a_rank(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(limits, "cpu_quota", lambda *root: None)
    assert threads_of_rank() == 3 and threads_of_rank(7) == 7 and loader_threads(8) == 8
    monkeypatch.setattr(limits, "cpu_quota", lambda *root: 8)
    limits._say_fewer_threads.cache_clear()
    with caplog.at_level("INFO"):
        assert threads_of_rank() == 2 and loader_threads(8) == 2 and loader_threads(1) == 1
        assert loader_threads(8) == 2  # of another loader
    (said,) = caplog.messages
    assert said.startswith("data.num_workers=8 is lowered to 2, this rank's share of a CPU quota of 8 for 4 ranks, ")
    monkeypatch.setattr(limits, "cpu_quota", lambda *root: 1)
    assert threads_of_rank() == 1 and loader_threads(8) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert threads_of_rank() == 5 and threads_of_rank(7) == 7


def test_a_session_has_the_threads_that_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(rank_variables.free_port()))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        with group.join():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# as torchrun does: in its own environment after its start, and so in that of its ranks
TORCHRUN = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
code = "from pipeline.limits import omp_threads; print(omp_threads())"
environ = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
sys.exit(subprocess.run([*sys.argv[1:], sys.executable, "-c", code], env=environ).returncode)
"""
WRAPPER = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"]


@pytest.mark.parametrize(("chosen", "prefix", "threads"), [("", [], 0), ("1", [], 1), ("2", [], 2), ("", WRAPPER, 0)])
def test_the_default_of_torchrun_is_not_the_users(chosen: str, prefix: list[str], threads: int) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "TORCHELASTIC_"))}
    environ |= {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": chosen} if chosen else {})
    done = subprocess.run(
        [sys.executable, "-c", TORCHRUN, *prefix], env=environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads


def test_odd_values_of_omp_num_threads_choose_nothing() -> None:
    assert [omp_threads({"OMP_NUM_THREADS": text}) for text in ("", "0", "many", "-2", " 4 ")] == [0, 0, 0, 0, 4]


@pytest.fixture
def group_of_one_cpu() -> Iterator[Path]:
    """Yield the file that moves a process into a real cgroup with a quota of one CPU."""
    made = []
    try:
        for version, level in limits.cgroup_levels("cpu"):
            names = ("cpu.max",) if version == 2 else ("cpu.cfs_period_us", "cpu.cfs_quota_us")
            if not (level / "cgroup.procs").is_file():
                continue
            group = level / f"test-{os.getpid()}"
            try:
                group.mkdir()
                made.append(group)
                for name in names:
                    (group / name).write_text("100000 100000" if version == 2 else "100000")
            except OSError:  # read-only, not root, or the controller is not handed down
                continue
            yield group / "cgroup.procs"
            return
        pytest.skip("this process may not make a cgroup with a CPU quota")
    finally:
        for group in made:
            group.rmdir()


def test_a_real_quota_is_found(group_of_one_cpu: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from pipeline.limits import cpu_quota, usable_cpus; from data_prep.options import NUM_CORES\n"
        "print(cpu_quota(), usable_cpus(), NUM_CORES)"
    )
    command = [sys.executable, "-c", code, str(group_of_one_cpu)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "1"], done.stderr


def test_cpus_are_counted_in_one_place() -> None:
    files = [path for folder in ("pipeline", "launchers", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    counting = {path.relative_to(ROOT).as_posix() for path in files if "sched_getaffinity" in path.read_text()}
    assert counting == {"pipeline/limits.py"}
    # the report of a crash also names the CPUs of the machine
    assert {path.name for path in files if "cpu_count" in path.read_text()} == {"crash.py"}

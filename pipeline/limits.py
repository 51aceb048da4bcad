"""How many CPUs this process may use, and where a cgroup limits it. Standard library only.

A container sees all CPUs of its host, but its cgroup may grant it the time of a few (``docker --cpus``, a limit
of Kubernetes, a job of Slurm). More threads than that are stopped for a part of every 100 ms.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path("/")


def cgroup_levels(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of this process's cgroup and of all its parents, each of which may limit it.

    Args:
        controller: ``cpu`` or ``memory``.
        root: where to find ``/proc`` and ``/sys``.

    Raises:
        OSError: this is not Linux, or ``/proc`` cannot be read.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            version, mounts = 2, ["", "unified"]  # unified: beside version 1
        elif controller in controllers.split(","):
            version, mounts = 1, [controller, controllers]  # cpu,cpuacct is mounted as one, cpu may be missing
        else:
            continue
        for mount in mounts:
            folder = root / "sys/fs/cgroup" / mount
            path = folder / group.strip("/")
            # in a container the group itself may not be visible, but the mount is the container's
            for level in (path, *path.parents):
                yield version, level
                if level == folder:
                    break


def cpu_quota(root: Path = ROOT) -> int | None:
    """Return how many CPUs the quotas of all cgroups leave, in whole CPUs and at least one; None without a quota.

    Version 1 has ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``, version 2 has both in ``cpu.max``. The smallest
    of all levels counts. A file that cannot be read or understood limits nothing.
    """
    try:
        quotas = [quota for version, level in cgroup_levels("cpu", root) if (quota := _quota(version, level))]
    except (OSError, ValueError):
        return None
    return min(quotas, default=None)


def _quota(version: int, level: Path) -> int | None:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = (int(word) for name in names for word in (level / name).read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(1, quota // period) if quota > 0 and period > 0 else None  # -1: none, as version 1 says it


def usable_cpus(root: Path = ROOT) -> int:
    """Return how many CPUs this process may use: those it may run on, or fewer if a cgroup has a quota."""
    available = len(os.sched_getaffinity(0))
    return min(available, cpu_quota(root) or available)


def ranks_on_this_node(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that share this node, as the launcher says it; 1 without a launcher."""
    # torchrun sets LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("WORLD_SIZE") or 1)


def omp_threads(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> int:
    """Return the number of threads that the user chose with ``OMP_NUM_THREADS``; 0 if it was not the user.

    torchrun sets the variable to 1 for several ranks if the user did not. It then is missing from the environment
    with which torchrun, the parent of a rank, was itself started.
    """
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number for each level of nesting
    if not first.isdecimal() or (first == "1" and _may_be_of_torchrun(environ, root)):
        return 0
    return int(first)


def _may_be_of_torchrun(environ: Mapping[str, str], root: Path) -> bool:
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    try:
        content = (root / "proc" / str(os.getppid()) / "environ").read_bytes()
    except OSError:
        return True
    names = {variable.partition(b"=")[0] for variable in content.split(b"\0")}
    # a parent that has a rank's own variables is a wrapper between torchrun and this process
    return b"OMP_NUM_THREADS" not in names or b"TORCHELASTIC_RUN_ID" in names


def cpus_of_rank(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> int:
    """Return this rank's share of the usable CPUs of this node, at least one."""
    usable, ranks = usable_cpus(root), ranks_on_this_node(environ)
    of_all_tasks = environ.get("SLURM_CPUS_ON_NODE", "")
    is_task = environ.get("SLURM_PROCID", "") == environ.get("RANK") and "TORCHELASTIC_RUN_ID" not in environ
    if is_task and of_all_tasks.isdecimal():  # srun may have bound each of its tasks to CPUs of its own
        return max(1, min(usable, int(of_all_tasks) // ranks))
    return max(1, usable // ranks)


def threads_of_rank(configured: int = 0) -> int:
    """Return the CPU threads of this rank.

    Args:
        configured: ``train.threads_per_rank``; 0: what the user chose with ``OMP_NUM_THREADS``, or else an equal
            share of the usable CPUs of this node.
    """
    return configured or omp_threads() or cpus_of_rank()


def loader_threads(configured: int) -> int:
    """Return the loader threads of this rank: as configured, or its share of the CPU quota if that is fewer."""
    if (quota := cpu_quota()) is None:
        return configured
    allowed = min(configured, max(1, quota // ranks_on_this_node()))
    if allowed < configured:
        _say_fewer_threads(configured, allowed, quota, ranks_on_this_node())
    return allowed


@functools.cache  # every loader of a run asks
def _say_fewer_threads(configured: int, allowed: int, quota: int, ranks: int) -> None:
    logger.info(
        "data.num_workers=%d is lowered to %d, this rank's share of a CPU quota of %d for %d rank%s, which would stop "
        "more threads for a part of every 100 ms",
        *(configured, allowed, quota, ranks, "s" * (ranks > 1)),
    )

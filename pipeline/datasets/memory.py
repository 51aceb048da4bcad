"""Check whether the training set fits into memory, and give advice before step 0 if it does not.

A training set that does not fit is read from disk in every epoch.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config.schema import DataConfig
from pipeline.datasets.sidecar import BetonInfo
from pipeline.limits import ROOT, cgroup_levels

logger = logging.getLogger(__name__)

GIB = 2**30


def memory_limit(root: Path = ROOT) -> tuple[int, str]:
    """Return how many bytes this process and its page cache may use, and what sets that limit.

    The limit is the machine's memory, or a smaller limit of a cgroup.
    """
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    limits = [(int(meminfo["MemTotal"].split()[0]) * 1024, "the machine's memory")]
    for version, level in cgroup_levels("memory", root):
        file = level / ("memory.max" if version == 2 else "memory.limit_in_bytes")
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            limits.append((int(text), f"the cgroup limit {file}"))
    return min(limits)


def advise(train: BetonInfo, data: DataConfig, *, ranks_here: int, root: Path = ROOT) -> list[str]:
    """Return lines of advice about the training set and this node's memory; none when it fits.

    The page cache is shared, so the file counts once, however many ranks read it. Half a GiB per
    rank is set aside for batches and libraries.

    Args:
        train: the training set.
        data: the section ``data`` of the configuration.
        ranks_here: number of ranks on this node.
        root: where to find ``/proc`` and ``/sys``.
    """
    limit, what = memory_limit(root)
    size = int(train.sidecar["size_bytes"])
    left = limit - ranks_here * GIB // 2
    if size <= left:
        return []
    if data.order == "quasi_random":
        window = data.window_mb * 2**20
        if window <= left // 2:
            return []
        return [
            f"data.window_mb: {data.window_mb} MiB of {train.path} are mixed at a time, more than half of "
            f"{what} ({limit / GIB:.1f} GiB), so blocks may be read more than once per epoch; "
            f"do: set data.window_mb={max(1, left // 2 // 2**20)}"
        ]
    how = "" if data.loader == "ffcv" else "write it with python -m data_prep, "
    return [
        f"{train.path} has {size / GIB:.1f} GiB, but {what} is {limit / GIB:.1f} GiB for {ranks_here} ranks, so every "
        f"epoch will read most of it from disk in random order; do: {how}set data.order=quasi_random, give the job "
        "more memory, or write a smaller data set"
    ]


def warn(train: BetonInfo, data: DataConfig, *, ranks_here: int) -> None:
    """Log the advice; never fails."""
    try:
        lines = advise(train, data, ranks_here=ranks_here)
    except (OSError, ValueError, KeyError) as error:  # not Linux, or a /proc unlike any known
        logger.info("memory: the available amount is unknown: %s", error)
        return
    for line in lines:
        logger.warning("memory: %s", line)

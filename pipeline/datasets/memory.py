"""Will the images fit into memory?

Said before step 0, with advice: a training set that does not is read from the disk every epoch.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config.schema import DataConfig
from pipeline.datasets.sidecar import BetonInfo

logger = logging.getLogger(__name__)

GIB = 2**30
ROOT = Path("/")


def memory_limit(root: Path = ROOT) -> tuple[int, str]:
    """(bytes this process and its page cache may use, what sets that limit): the machine's memory, or a smaller cgroup limit."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    limits = [(int(meminfo["MemTotal"].split()[0]) * 1024, "the machine's memory")]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            folder, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        path = folder / group.lstrip("/")
        for level in (
            path,
            *path.parents,
        ):  # a limit of any group above counts too; in a container the group itself is not visible
            file = level / name
            if file.is_file() and (text := file.read_text().strip()).isdecimal():
                limits.append((int(text), f"the cgroup limit {file}"))
            if level == folder:
                break
    return min(limits)


def advise(train: BetonInfo, data: DataConfig, *, ranks_here: int, root: Path = ROOT) -> list[str]:
    """Lines of advice about the training set and this node's memory; none when it fits.

    The page cache is shared: the file counts once, however many ranks read it. Half a GiB a rank is
    set aside for batches and libraries.
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
            f"data.window_mb: {data.window_mb} MiB of {train.path} are mixed at a time, more than half of {what}, {limit / GIB:.1f} GiB: "
            f"blocks may be read more than once an epoch; set data.window_mb={max(1, left // 2 // 2**20)}"
        ]
    how = "" if data.loader == "ffcv" else "write it with python -m data_prep, "
    return [
        f"{train.path} has {size / GIB:.1f} GiB, {what} is {limit / GIB:.1f} GiB for {ranks_here} ranks: every epoch will read most of it "
        f"from the disk in random order; {how}set data.order=quasi_random, give the job more memory, or write a smaller set"
    ]


def warn(train: BetonInfo, data: DataConfig, *, ranks_here: int) -> None:
    """Log the advice; never a reason to fail."""
    try:
        lines = advise(train, data, ranks_here=ranks_here)
    except (OSError, ValueError, KeyError) as error:  # not Linux, or a /proc unlike any known
        logger.info("memory: cannot tell how much there is: %s", error)
        return
    for line in lines:
        logger.warning("memory: %s", line)

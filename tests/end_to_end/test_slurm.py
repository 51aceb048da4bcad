"""Real tasks of Slurm are ranks of one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.slurm import HOST, Cluster, running_cluster

PLACE = """
import json, os
from pipeline.distributed.rank_variables import launcher, take_place
before = set(os.environ)
take_place()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
found = [os.environ[name] for name in names if name in set(os.environ) - before]
print(json.dumps({"set": found, "launcher": launcher(),
                  "hosts": os.environ.get("SLURM_STEP_NODELIST"), "tasks": os.environ["SLURM_NTASKS"]}))
"""
NUMBERS = """
import os, sys
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(f"{os.environ['LOCAL_RANK']} of {os.environ['WORLD_SIZE']}")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


def lines_of(text: str) -> list[Any]:
    """Return what the tasks printed by ``PLACE``, in the order of their ranks."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda one: one["set"])


def test_tasks_on_two_hosts_are_ranks(cluster: Cluster) -> None:
    found = lines_of(cluster.run("srun", "--nodes=2", "--ntasks=3", sys.executable, "-c", PLACE))
    assert [one["launcher"] for one in found] == ["srun"] * 3
    assert [one["set"][:5] for one in found] == [
        ["0", "3", "0", "2", HOST],
        ["1", "3", "1", "2", HOST],
        ["2", "3", "0", "1", HOST],
    ]
    assert len({one["set"][5] for one in found}) == 1  # the port
    assert cluster.run("scontrol", "show", "hostnames", found[0]["hosts"]).split()[0] == HOST


def test_shells_of_a_job_are_no_ranks(cluster: Cluster, tmp_path: Path) -> None:
    script, log = tmp_path / "script.sh", tmp_path / "log"
    script.write_text(f"#!/bin/bash\n'{sys.executable}' - <<'END'\n{PLACE}\nEND\n")
    sbatch = ["sbatch", "--wait", "--ntasks=2", "--open-mode=append", f"--output={log}", str(script)]
    cluster.run(*sbatch)
    # a script that a task submits inherits the variables of the task's step
    submit = f'[ "$SLURM_PROCID" = 1 ] || {" ".join(sbatch)}'
    cluster.run("srun", "--nodes=1", "--ntasks=2", "bash", "-c", submit)
    salloc = cluster.run("salloc", "--ntasks=2", sys.executable, "-c", PLACE)
    found = [*lines_of(log.read_text()), *lines_of(salloc)]
    assert [(one["set"], one["launcher"], one["tasks"]) for one in found] == [([], "", "2")] * 3


def test_a_supervisor_on_each_host_starts_the_ranks_of_one_run(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "numbers.py"
    script.write_text(NUMBERS)
    command = [sys.executable, "-m", "launchers.run", "--nproc-per-node", "1", "--", str(script), str(tmp_path)]
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, seconds=60)
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["0 of 2", "0 of 2"]

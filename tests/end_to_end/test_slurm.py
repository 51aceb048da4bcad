"""Real tasks of Slurm train as ranks of one run; the batch script requeues a run that was asked to stop."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_job import assert_same, tickets_of
from tests.support import sweeps
from tests.support.launch import ROOT
from tests.support.ranks import RankServer
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
JOB = [
    "model.args={width: 8, stem_stride: 2}",
    "train.threads_per_rank=1",
    "plan.exploration.length=120 steps",
    "plan.exploration.update_interval=10 steps",
    "plan.refinement.length=20 steps",
    "checkpoint.every=10 steps",
]


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


def wait_until(condition: Callable[[], bool], log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "nothing has started"
        time.sleep(0.1)


def test_a_stopped_job_is_requeued_and_ends_with_the_bits_of_one_that_was_not(cluster: Cluster, tmp_path: Path) -> None:
    """The job runs by the batch script; Slurm starts it again after ``cred_expire``, while the other one trains."""
    configuration = str(sweeps.make_configuration(tmp_path))
    job, output, log = ["--config", configuration, *JOB], tmp_path / "job", tmp_path / "log"
    resources = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10"]
    sbatch = ["sbatch", "--parsable", *resources, f"--output={log}", "launchers/slurm.sbatch"]
    number = cluster.run(*sbatch, *job, f"output_dir={output}").strip()

    def shown() -> dict[str, str]:
        text = cluster.run("scontrol", "show", "job", "--oneliner", number)
        return dict(field.partition("=")[::2] for field in text.split())

    def wait_for(condition: Any, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            failed = time.monotonic() > deadline or shown()["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT")
            assert not failed, log.read_text() if log.exists() else cluster.logs()
            time.sleep(0.1)

    wait_for(lambda: any(output.glob("checkpoints/step-*")))
    cluster.run("scancel", "--signal=USR1", number)  # as --signal=USR1@120 does to the tasks
    reference = [*job, f"output_dir={tmp_path / 'reference'}"]
    with RankServer.running(reference, log=tmp_path / "server.log") as server:
        other = server.start(reference, log=tmp_path / "reference.log")
        assert other.wait(300) == [0, 0], other.text
    wait_for(lambda: shown()["Restarts"] == "1")
    wait_for(lambda: shown()["JobState"] == "COMPLETED")
    stopped = re.findall(
        r"^STOPPED\[75\] rank=0 .*; resume with: srun … .*train\.py --config .*$", log.read_text(), re.M
    )
    assert len(stopped) == 1 and "ERROR" not in log.read_text()
    assert_same(tickets_of(output), tickets_of(tmp_path / "reference"), num=2)


def test_a_sweep_as_an_array_with_a_requeue_has_the_table_of_one_without_slurm(
    cluster: Cluster, tmp_path: Path
) -> None:
    configuration = str(sweeps.make_configuration(tmp_path))
    seeds = ["--config", configuration, "--seeds", "2", *JOB]

    def sweep(*more: str) -> str:
        done = subprocess.run(
            sweeps.command(*seeds, *more), cwd=ROOT, env=cluster.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folder, log = tmp_path / "array", tmp_path / "log-%a"
    first = ["--output", str(folder), "--array"]
    (command,) = re.findall(r"^sbatch (.*)$", sweep(*first), re.MULTILINE)
    array, script, *arguments = shlex.split(command)
    assert (array, script) == ("--array=0-1", "launchers/slurm.sbatch")
    resources = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10"]
    number = cluster.run("sbatch", "--parsable", array, *resources, f"--output={log}", script, *arguments).strip()
    stopped = folder / "seed=0"
    wait_until(lambda: any(stopped.glob("checkpoints/step-*")), tmp_path / "log-0")
    cluster.run("scancel", "--signal=USR1", f"{number}_0")
    sweep("--output", str(tmp_path / "plain"))
    wait_until(lambda: not cluster.run("squeue", "--noheader", f"--job={number}"), tmp_path / "log-0")
    text = (tmp_path / "log-0").read_text()
    assert text.count("STOPPED[75]") == 1 and "resumed from" in text and "ERROR" not in text

    assert "sbatch" not in sweep(*first)  # nothing is missing; it writes the table
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("array", "plain")]
    assert len(tables[0]["rows"]) == 3 and tables[0]["num_missing"] == 0
    assert tables[0] == tables[1]

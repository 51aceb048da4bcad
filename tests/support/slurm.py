"""A cluster of Slurm on this machine: its daemons, on ports and in folders of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT, free_port

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch")
WHY_NO_SLURM = "Slurm is not here: apt-get install slurm-wlm munge"
SECONDS = 20.0
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second")  # the first one resolves, as the host of rank 0 must
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=5
"""


@dataclass(frozen=True)
class Cluster:
    """Two nodes of two CPUs each, both on this machine."""

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """The environment of this process, for commands of Slurm."""
        own = {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "CUDA_VISIBLE_DEVICES": ""}
        return dict(os.environ) | own

    def run(self, *command: str, seconds: float = SECONDS, environ: Mapping[str, str] | None = None) -> str:
        """Return what the command prints; it must succeed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ | dict(environ or {}), capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        """Return the last lines of every daemon."""
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons, and end them; skip the test where Slurm is missing or this user is not root."""
    if any(shutil.which(program, path=PATH) is None for program in PROGRAMS):
        pytest.skip(WHY_NO_SLURM)
    if os.geteuid() != 0:
        pytest.skip("the daemons of Slurm need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, because the path of a socket must be
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        cluster = _configure(folder)
        environ = {name: text for name, text in cluster.environ.items() if not name.startswith("NOTIFY_")}
        munge = [f"--{name}={folder}/munge/{name.partition('-')[0]}" for name in ("key-file", "log-file", "pid-file")]
        munge += [f"--seed-file={folder}/munge/seed", f"--socket={folder}/munge/socket", "--foreground", "--force"]
        for command in (["munged", *munge], ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            with (folder / f"{command[0]}-output.log").open("ab") as log:
                daemons.append(
                    subprocess.Popen(
                        command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                    )
                )
            if command[0] == "munged":
                _wait_for((folder / "munge" / "socket").exists, cluster)
        _wait_for(lambda: _num_idle(cluster) == len(NODES), cluster)
        yield cluster
        if cluster.run("squeue", "--noheader"):  # of a test that failed
            cluster.run("scancel", "--user=root", "--full", "--signal=KILL")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> Cluster:
    for name in ("munge", "state", *NODES):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    lines = [CONFIGURATION.format(host=HOST, port=free_port(), folder=folder)]
    port = free_port()
    ports = f"[{port}-{port + len(NODES) - 1}]"  # Slurm wants the nodes of one host in one line
    lines.append(f"NodeName={','.join(NODES)} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={ports} CPUs=2\n")
    lines.append("PartitionName=all Nodes=ALL Default=YES State=UP\n")
    (folder / "slurm.conf").write_text("".join(lines))
    return Cluster(folder)


def _num_idle(cluster: Cluster) -> int:
    listed = subprocess.run(["sinfo", "-N", "-h", "-o", "%t"], env=cluster.environ, capture_output=True, text=True)
    return listed.stdout.split().count("idle")


def _wait_for(condition: object, cluster: Cluster) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)

"""Runs the main job on several emulated hosts, by each launcher that can start it there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.launch import BIN, ROOT, free_port, kill, start
from tools.hosts import INTERFACE, Host

TRAIN = ROOT / "launchers" / "train.py"
SSHD = "/usr/sbin/sshd"


def launched(launcher: str, at: Sequence[Host], folder: Path, options: Sequence[str]) -> list[list[str]]:
    """Return the command for each host; pdsh starts on the first host and uses ssh for the others."""
    address = [f"--master_addr={at[0].name}", f"--master_port={free_port()}"]
    hostfile, variables = folder / "hostfile", folder / "variables"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in at))
    variables.write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")  # pdsh passes on only a few variables
    lines = []
    for index, host in enumerate(at[:1] if launcher == "pdsh" else at):
        head = {
            "torchrun": [
                str(BIN / "torchrun"),
                f"--nnodes={len(at)}",
                "--nproc-per-node=1",
                *address,
                f"--node_rank={index}",
            ],
            "deepspeed": [
                str(BIN / "deepspeed"),
                f"--hostfile={hostfile}",
                "--no_ssh",
                *address,
                f"--node_rank={index}",
            ],
            "pdsh": [
                str(BIN / "deepspeed"),
                f"--hostfile={hostfile}",
                "--no_ssh_check",
                *address,
            ],  # which does not read ssh_config
        }[launcher]
        environ = [
            f"GLOO_SOCKET_IFNAME={INTERFACE}",
            f"DS_ENV_FILE={variables}",
            f"PDSH_SSH_ARGS_APPEND=-F {folder / 'ssh_config'}",
        ]
        lines.append(host.command(["env", *environ, *head, str(TRAIN), *options]))
    return lines


@contextmanager
def reachable_by_ssh(at: Sequence[Host], folder: Path) -> Iterator[None]:
    """Start an sshd on every host, and write ``folder/ssh_config`` to reach it without a password."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "ssh_config").write_text(
        f"Host *\nIdentityFile {folder / 'user'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile {folder / 'known'}\nLogLevel ERROR\n"
    )
    files = {"HostKey": "host", "AuthorizedKeysFile": "user.pub", "PidFile": "pid"}
    (folder / "sshd_config").write_text(
        "".join(f"{key} {folder / name}\n" for key, name in files.items()) + "StrictModes no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # the folder that sshd changes its root to
    servers = [host.command([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]) for host in at]
    with running(servers, folder, name="sshd"):
        yield


@contextmanager
def running(
    lines: Sequence[Sequence[str]], folder: Path, *, name: str = "host"
) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [start(line, log=folder / f"{name}-{index}.log") for index, line in enumerate(lines)]
    try:
        yield processes
    finally:
        for process in processes:
            kill(process)

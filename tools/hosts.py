"""Emulates several hosts on one machine, as network namespaces with real TCP between them.

Needs Linux and root; uses only the standard library.

::

    with hosts(2, mbit_per_second=1000) as (first, second):
        subprocess.run(first.command(["ping", "-c", "1", second.address]))

Each host has its own host name and /etc/hosts, an interface ``eth0``, and a cable of the given speed
in both directions to a common switch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Host:
    """One emulated host."""

    name: str
    address: str
    namespace: str
    hosts_file: Path

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` on this host.

        The process that starts it becomes ``argv``, so that signals reach it.
        """
        unshare = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", self.name, str(self.hosts_file), *argv]
        return ["ip", "netns", "exec", self.namespace, *unshare]


def unsupported_reason() -> str:
    """Return why hosts cannot be emulated on this machine; empty if they can."""
    if missing := [tool for tool in ("ip", "tc", "unshare") if not shutil.which(tool)]:
        return f"{', '.join(missing)} not found: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"probe{os.getpid()}"
    if (made := subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)).returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return ""


@contextmanager
def hosts(num: int, *, mbit_per_second: float | None = None) -> Iterator[list[Host]]:
    """Emulate ``num`` hosts h0, h1, … until the end of the block.

    Without a rate, their cables are as fast as memory.
    """
    switch = f"tw{os.getpid()}-switch"
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        file = Path(folder) / "hosts"
        made = [Host(f"h{i}", f"10.77.0.{i + 1}", f"tw{os.getpid()}-h{i}", file) for i in range(num)]
        file.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made))
        try:
            _run("ip", "netns", "add", switch)
            _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "bridge", "up")
            for host in made:
                _plug_in(host, switch, mbit_per_second)
            yield made
        finally:
            for namespace in [switch, *(host.namespace for host in made)]:
                subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _plug_in(host: Host, switch: str, mbit_per_second: float | None) -> None:
    port = f"to-{host.name}"
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "link", "add", INTERFACE, "netns", host.namespace, "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
    for namespace, device in ((host.namespace, "lo"), (host.namespace, INTERFACE), (switch, port)):
        _run("ip", "-n", namespace, "link", "set", device, "up")
    if mbit_per_second is None:
        return
    for namespace, device in ((host.namespace, INTERFACE), (switch, port)):
        shaping = ["rate", f"{mbit_per_second:g}mbit", "burst", "128kb", "latency", "50ms"]
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *shaping)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

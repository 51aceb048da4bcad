"""Where the nodes of a run meet before each round, and agree after it on what follows.

Node 0 has a :class:`launchers.hub.Hub`; every node, node 0 too, has a connection to it. A node that is lost and
comes back connects again. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections import deque
from collections.abc import Callable

from launchers.hub import Connection, Hub, Message
from launchers.verdict import Judge, Result, Verdict
from pipeline import __version__
from pipeline.distributed.rank_variables import KUBERNETES, LOOPBACK, require_resolvable
from pipeline.errors import ConfigError, PeerError, RunError

TICK_SECONDS = 0.1
PING_SECONDS = 1.0
CONNECT_SECONDS = 5.0
SAY_SECONDS = 30.0  # between the lines of a node that waits


def say(node: int, text: str) -> None:
    """Print a line of the supervisor, with the time, as the ranks do."""
    print(f"{time.strftime('%H:%M:%S')} launchers.run on node {node}: {text}", flush=True)


class Alone:
    """The meeting of a run with one node."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._judge, self._port = Judge(options.restarts), options.master_port

    def gather(self, is_asked_to_stop: Callable[[], bool]) -> int | None:
        """Return the port for the ranks; None if this node was asked to stop meanwhile."""
        return None if is_asked_to_stop() else int(self._port)

    def must_stop(self) -> bool:
        """Return whether the ranks here must stop, because others have failed."""
        return False

    def report(self, result: Result, is_asked_to_stop: Callable[[], bool]) -> Verdict:
        """Tell how the ranks of this node have ended; return the verdict of all."""
        return self._judge.decide({0: result}, time.monotonic())

    def close(self) -> None:
        """Leave the meeting."""


class Meeting:
    """The meeting of a run with several nodes; see :class:`Alone` for the methods.

    Raises:
        ServiceError: the port of node 0 is taken.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._node, self._num_nodes = options.node_rank, options.nnodes
        self._judge = Judge(options.restarts)
        self._address = options.master_addr
        self._hub: Hub | None = None
        if self._node == 0:
            require_address(options.master_addr)
            self._hub = Hub(options.nnodes, options.master_port, self._judge, peer_timeout_seconds=options.peer_timeout)
            self._address = LOOPBACK
        self._link: Connection | None = None
        self._pinged = 0.0
        self._missing: list[int] = []
        self._messages: deque[Message] = deque()  # of node 0, not yet read
        self._has_met = False

    def gather(self, is_asked_to_stop: Callable[[], bool]) -> int | None:
        """Wait until all nodes are here; say every SAY_SECONDS which are not.

        Raises:
            PeerError: a node is missing after ``--wait`` seconds, or another process is this node now.
            ConfigError: the nodes were started with different options, or the name of node 0 is unknown.
            RunError: the other nodes have ended the run.
        """
        begun = said = time.monotonic()
        while not is_asked_to_stop():
            reason = self._connect()
            self._exchange(TICK_SECONDS)
            while self._messages:
                message = self._messages.popleft()
                if "start" in message:
                    seconds = time.monotonic() - begun
                    say(self._node, f"all {self._num_nodes} nodes are here after {seconds:.0f} s, ranks start")
                    self._has_met = True
                    return int(message["port"])
                if message.get("verdict") is not None:
                    raise _ended(int(message["verdict"]), str(message["why"]))
            now = time.monotonic()
            if self._link is not None:
                who = ", ".join(map(str, self._missing)) or "nobody"
                reason = f"node {who} of 0 to {self._num_nodes - 1}"
            if now - begun > self._options.wait:
                raise PeerError(
                    f"launchers.run: after {self._options.wait} s still waiting for {reason}",
                    do="start every node again, or give them more time with --wait",
                )
            if now - said >= SAY_SECONDS:
                said = now
                say(self._node, f"waiting for {reason}, since {now - begun:.0f} s of at most {self._options.wait} s")
        return None

    def must_stop(self) -> bool:
        """Return whether another node has failed, or the connection to node 0 is lost."""
        self._exchange(0)
        return self._link is None or any("stop" in message for message in self._messages)

    def report(self, result: Result, is_asked_to_stop: Callable[[], bool]) -> Verdict:
        """Tell how the ranks of this node have ended; return the verdict, once all nodes have told.

        A node that is asked to stop does not wait for the others.
        """
        self._send({"code": result.code, "is_leaving": result.is_leaving})
        while not result.is_leaving:
            if is_asked_to_stop():
                return Verdict(int(result.code or 0))
            self._exchange(TICK_SECONDS)
            while self._messages:
                message = self._messages.popleft()
                if "verdict" in message:
                    code = message["verdict"]
                    return Verdict(None if code is None else int(code), str(message["why"]))
            if self._link is None:
                break
        return self._judge.decide_alone(int(result.code or 0))

    def close(self) -> None:
        """Leave; on node 0 after the others have heard the verdict."""
        self._drop()
        if self._hub is not None:
            self._hub.close()

    def _connect(self) -> str:
        """Connect to node 0, unless that is done; return why it cannot be."""
        if self._link is not None:
            return ""
        host, port = self._address, self._options.master_port
        if not self._has_met:
            require_address(host)
        time.sleep(TICK_SECONDS)
        try:
            connected = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        except (OSError, UnicodeError) as error:
            return f"node 0 at {host}:{port} ({getattr(error, 'strerror', None) or error})"
        self._link = Connection(connected, time.monotonic())
        self._messages.clear()
        self._send({"node": self._node, "nnodes": self._num_nodes, "version": __version__})
        self._pinged = time.monotonic()
        return ""

    def _exchange(self, seconds: float) -> None:
        """Send a ping when it is time, and read what node 0 says, waiting up to ``seconds`` for it.

        Raises:
            ConfigError, PeerError: it refuses this node.
        """
        deadline = time.monotonic() + seconds
        heard: list[Message] = []
        while self._link is not None and not heard:
            try:
                heard = self._link.receive()
            except (OSError, ValueError):
                self._drop()
                break
            if time.monotonic() - self._link.heard > self._options.peer_timeout:
                self._drop()
            elif time.monotonic() - self._pinged > PING_SECONDS:
                self._pinged = time.monotonic()
                self._send({"ping": True})
            if time.monotonic() >= deadline:
                break
            time.sleep(TICK_SECONDS / 2)
        for message in heard:
            if "refused" in message:
                kind = ConfigError if message["code"] == ConfigError.code else PeerError
                raise kind(f"launchers.run: {message['refused']}", do="start each node once, all alike")
            self._missing = message.get("missing", self._missing)
        self._messages.extend(message for message in heard if "missing" not in message)

    def _send(self, message: Message) -> None:
        try:
            if self._link is not None:
                self._link.send(message)
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._link is not None:
            self._link.socket.close()
            self._link = None


def require_address(host: str) -> None:
    """Check that the name of node 0 has an address here, unless it may have one later.

    Raises:
        ConfigError: it has none, and this is not Kubernetes, where a pod gets its address when it is placed.
    """
    if KUBERNETES not in os.environ:
        require_resolvable(host, f"--master-addr {host!r}")


def _ended(code: int, why: str) -> RunError:
    error = RunError(f"launchers.run: the run has ended with exit code {code}{f': {why}' if why else ''}")
    error.code = code
    return error

"""Node 0's side of the meeting of nodes: who is here, when a round starts, when it must stop, what follows.

A thread of the supervisor of node 0. It keeps no file: where node 0 is replaced, the nodes meet again.
Messages are JSON objects, one a line. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launchers.verdict import Judge, Result
from pipeline import __version__
from pipeline.distributed.rank_variables import free_port
from pipeline.errors import ConfigError, PeerError, Preempted, ServiceError
from pipeline.files import parse_json

Message = dict[str, Any]
MAX_LINE_BYTES = 4096
TICK_SECONDS = 0.1
SEND_SECONDS = 5.0
END_SECONDS = 10.0  # for other nodes to report after this one is to leave
SAVED = (0, Preempted.code)  # a node whose ranks end so asks no other node to stop


@dataclass
class Connection:
    """A connection that sends and receives messages, without waiting for any."""

    socket: socket.socket
    heard: float  # when the other side last sent something, time.monotonic()
    node: int | None = None  # of the other side, once it is known
    _read: bytes = b""
    _is_closed: bool = False  # by the other side

    def send(self, message: Message) -> None:
        """Send a message; raise OSError if the other side does not take it within SEND_SECONDS."""
        self.socket.settimeout(SEND_SECONDS)
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """Return the messages that are there.

        Raises:
            OSError: the other side is gone, and all that it sent before was returned.
            ValueError: what it sends is not a message.
        """
        if self._is_closed:
            raise ConnectionResetError("the connection was closed")
        self.socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                part = self.socket.recv(MAX_LINE_BYTES)
                self._is_closed = not part
                if self._is_closed:
                    break
                self.heard = time.monotonic()
                self._read += part
                if len(self._read) > 16 * MAX_LINE_BYTES:
                    raise ValueError("too much at once")
        *lines, self._read = self._read.split(b"\n")
        if len(self._read) > MAX_LINE_BYTES:
            raise ValueError("a line is too long")
        messages = [parse_json(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not an object")
        return messages


@dataclass
class Round:
    """A round that runs, or has ended but for some nodes."""

    number: int
    results: dict[int, Result] = field(default_factory=dict)
    is_stopping: bool = False


class Hub:
    """Listens on ``port`` of this host, for ``num_nodes`` nodes; raises ServiceError if the port is taken."""

    def __init__(self, num_nodes: int, port: int, judge: Judge, *, peer_timeout_seconds: float) -> None:
        self._num_nodes, self._judge, self._peer_timeout = num_nodes, judge, peer_timeout_seconds
        is_dual = socket.has_dualstack_ipv6()
        try:
            self._server = socket.create_server(
                ("", port), family=socket.AF_INET6 if is_dual else socket.AF_INET, dualstack_ipv6=is_dual
            )
        except OSError as error:
            raise ServiceError(
                f"launchers.run: port {port} of this host cannot be opened: {error.strerror}",
                do="choose another --master-port",
            ) from None
        self._server.settimeout(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._strangers: list[Connection] = []  # which have not said who they are
        self._nodes: dict[int, Connection] = {}
        self._round: Round | None = None
        self._num_rounds = 0
        self._refusal: Message | None = None  # for all nodes, also those that come later
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until the other nodes have heard the verdict, at most END_SECONDS, and stop listening."""
        deadline = time.monotonic() + END_SECONDS
        while self._round is not None and not self._is_over and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
        self._is_over = True
        self._thread.join(2 * SEND_SECONDS)

    def _serve(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            for connection in [*self._strangers, *self._nodes.values()]:
                if now - connection.heard > self._peer_timeout:
                    self._drop(connection)
            if self._round is None:
                self._start_if_complete()
            else:
                self._watch(self._round)
        self._server.close()
        self._part()

    def _part(self) -> None:
        """Close the connections; the other side reads all first, which it could not after a reset."""
        open_ones = [*self._strangers, *self._nodes.values()]
        for connection in open_ones:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + SEND_SECONDS
        for connection in open_ones:
            with contextlib.suppress(OSError, ValueError):
                while time.monotonic() < deadline:
                    connection.receive()
                    time.sleep(TICK_SECONDS)
            connection.socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = self._server.accept()
            self._strangers.append(Connection(accepted, time.monotonic()))
            self._selector.register(accepted, selectors.EVENT_READ, self._strangers[-1])

    def _hear(self, connection: Connection) -> None:
        try:
            for message in connection.receive():
                self._take(connection, message)
        except (OSError, ValueError, KeyError, TypeError):
            self._drop(connection)

    def _take(self, connection: Connection, message: Message) -> None:
        if connection.node is None:
            self._greet(connection, message)
        elif "code" in message:
            result = Result(int(message["code"]), bool(message["is_leaving"]))
            if self._round is not None:
                self._round.results.setdefault(connection.node, result)
            if result.is_leaving:
                self._drop(connection)
        else:
            connection.send({"missing": self._missing()})

    def _greet(self, connection: Connection, message: Message) -> None:
        node = int(message["node"])
        expected = {"nnodes": self._num_nodes, "version": __version__}
        for name, value in expected.items():
            if message[name] != value:
                text = f"node {node} was started with {name} {message[name]!r}, but node 0 with {name} {value!r}"
                refusal = {"refused": text, "code": ConfigError.code}
                connection.send(refusal)
                if self._num_rounds == 0:  # nobody can know whose mistake it is; a run that goes on is left alone
                    self._refusal = refusal
                    self._tell(lambda _: True, refusal)
                return
        if not 0 <= node < self._num_nodes:
            raise ValueError("no such node")
        if (before := self._nodes.get(node)) is not None:  # of a process that hangs, or was started twice
            text = f"another process has taken the place of node {node}"
            with contextlib.suppress(OSError):
                before.send({"refused": text, "code": PeerError.code})
            self._drop(before)
        self._strangers.remove(connection)
        connection.node, self._nodes[node] = node, connection
        connection.send(self._refusal or {"missing": self._missing()})

    def _missing(self) -> list[int]:
        return [] if self._round is not None else [n for n in range(self._num_nodes) if n not in self._nodes]

    def _drop(self, connection: Connection) -> None:
        """Close a connection; its node is lost to the round, unless it has said how its ranks ended."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection in self._strangers:
            self._strangers.remove(connection)
        elif connection.node is not None and self._nodes.get(connection.node) is connection:
            del self._nodes[connection.node]
            if self._round is not None:
                self._round.results.setdefault(connection.node, Result(None))

    def _start_if_complete(self) -> None:
        if len(self._nodes) == self._num_nodes and self._refusal is None:
            self._num_rounds += 1
            self._round = Round(self._num_rounds)
            self._tell(lambda _: True, {"start": self._num_rounds, "port": free_port()})

    def _watch(self, current: Round) -> None:
        results = current.results
        if not current.is_stopping and any(result.code not in SAVED for result in results.values()):
            current.is_stopping = True
            self._tell(lambda node: node not in results, {"stop": True})
        if len(results) == self._num_nodes:
            verdict = self._judge.decide(results, time.monotonic())
            self._round = None
            self._tell(lambda node: node in results, {"verdict": verdict.code, "why": verdict.why})
            self._is_over = verdict.code is not None

    def _tell(self, chosen: Callable[[int], bool], message: Message) -> None:
        for node, connection in list(self._nodes.items()):
            if chosen(node):
                try:
                    connection.send(message)
                except OSError:
                    self._drop(connection)

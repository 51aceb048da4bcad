"""Nodes that meet over real connections, as threads of one process; nothing is trained."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from launchers import meeting
from launchers.meeting import Meeting
from launchers.run import parse
from launchers.verdict import Result
from pipeline.errors import ConfigError, PeerError, ServiceError
from tests.support.launch import free_port

TIMEOUT_SECONDS = 20


def never() -> bool:
    return False


class Nodes:
    """Makes the meetings of the nodes of one run, and lets them do things at the same time."""

    def __init__(self) -> None:
        self.port, self.pool, self.made = free_port(), ThreadPoolExecutor(8), list[Meeting]()

    def options(self, node: int, *more: str) -> argparse.Namespace:
        address = ["--master-addr=127.0.0.1", f"--master-port={self.port}", "--nproc-per-node=1"]
        return parse(
            ["--nnodes=2", *address, f"--node-rank={node}", "--peer-timeout=2", *more, "--", "x", "--resume=auto"]
        )

    def node(self, node: int, *more: str) -> Meeting:
        self.made.append(Meeting(self.options(node, *more)))
        return self.made[-1]

    def do(self, action: Callable[..., object], *arguments: object) -> Future[object]:
        return self.pool.submit(action, *arguments)

    def gather(self, *meetings: Meeting) -> list[object]:
        return [each.result(TIMEOUT_SECONDS) for each in [self.do(one.gather, never) for one in meetings]]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    for one in reversed(made.made):
        one.close()
    made.pool.shutdown()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_get_the_same_port_and_the_same_verdict(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    ports = nodes.gather(second, first)
    assert ports[0] == ports[1]
    verdicts = [nodes.do(one.report, Result(code), never) for one, code in ((first, 76), (second, 1))]
    assert [each.result(TIMEOUT_SECONDS).code for each in verdicts] == [None, None]  # type: ignore[attr-defined]
    assert nodes.gather(first, second)[0] not in ports
    verdicts = [nodes.do(one.report, Result(0), never) for one in (first, second)]
    assert [each.result(TIMEOUT_SECONDS).code for each in verdicts] == [0, 0]  # type: ignore[attr-defined]


def test_a_failed_node_stops_the_others_and_a_saved_one_does_not(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    nodes.gather(first, second)
    leaving = nodes.do(second.report, Result(75, is_leaving=True), never)
    leaving.result(TIMEOUT_SECONDS)
    time.sleep(0.5)
    assert not first.must_stop()
    assert first.report(Result(75), never).why == "node 1 has left with exit code 75"
    third = nodes.node(1)
    nodes.gather(first, third)
    third.close()
    wait_until(first.must_stop)
    assert first.report(Result(76), never).why == "node 1 was lost"


def test_a_node_that_says_nothing_is_lost(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    nodes.gather(first, second)
    started = time.monotonic()
    wait_until(first.must_stop)  # the second one does nothing
    assert 1.5 < time.monotonic() - started < 6
    assert first.report(Result(76), never).code is None
    wait_until(second.must_stop)  # it sees that its connection was closed
    second.report(Result(76), never)
    nodes.gather(first, second)


def test_the_others_wait_for_a_new_node_0(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    nodes.gather(first, second)
    first.report(Result(75, is_leaving=True), never)
    first.close()
    wait_until(second.must_stop)
    assert second.report(Result(75), never).code is None
    nodes.gather(second, nodes.node(0))


def test_what_is_missing_is_said_and_the_wait_is_bounded(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "SAY_SECONDS", 0.5)
    with pytest.raises(PeerError, match="after 1 s still waiting for node 1 of 0 to 1"):
        nodes.node(0, "--wait=1").gather(never)
    assert "waiting for node 1 of 0 to 1, since " in capsys.readouterr().out
    nodes.made.pop().close()
    with pytest.raises(PeerError, match=r"still waiting for node 0 at 127.0.0.1:\d+ \(Connection refused\)"):
        nodes.node(1, "--wait=1").gather(never)


def test_a_stop_ends_the_waiting(nodes: Nodes) -> None:
    assert nodes.node(0).gather(lambda: True) is None


def test_a_stop_ends_the_waiting_for_the_verdict(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    nodes.gather(first, second)
    assert second.report(Result(76), lambda: True).code == 76  # node 0 has not reported
    second.close()
    assert first.report(Result(76), never).code is None


def test_another_number_of_nodes_ends_all_in_seconds(nodes: Nodes) -> None:
    first, second = nodes.node(0), nodes.node(1, "--nnodes=3")
    refused = nodes.do(second.gather, never)
    wait_until(refused.done)  # node 0 itself may come to its hub later
    for waiting in (refused, nodes.do(first.gather, never)):
        with pytest.raises(ConfigError, match="node 1 was started with nnodes 3, but node 0 with nnodes 2"):
            waiting.result(5)


def test_the_newest_process_is_the_node(nodes: Nodes) -> None:
    first, old = nodes.node(0), nodes.node(1)
    nodes.gather(first, old)
    new = nodes.node(1)
    waiting = nodes.do(new.gather, never)
    with pytest.raises(PeerError, match="another process has taken the place of node 1"):
        wait_until(old.must_stop)
    wait_until(first.must_stop)
    first.report(Result(76), never)
    nodes.gather(first)
    waiting.result(TIMEOUT_SECONDS)


def test_the_port_may_be_taken(nodes: Nodes) -> None:
    with socket.create_server(("", nodes.port)), pytest.raises(ServiceError, match="cannot be opened"):
        nodes.node(0)


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 3000 + b"\n",
        b"x" * 200_000,
        b'{"node": -1, "nnodes": 2}\n',
        json.dumps({"node": 1e400, "nnodes": 2}).encode() + b"\n",
        b'{"node": "1"}\n[]\n\xff\n',
    ],
)
def test_strangers_do_no_harm(nodes: Nodes, content: bytes) -> None:
    first, second = nodes.node(0), nodes.node(1)
    with socket.create_connection(("127.0.0.1", nodes.port)) as stranger:
        stranger.settimeout(TIMEOUT_SECONDS)
        try:
            stranger.sendall(content)
            assert stranger.recv(1) == b""  # refused
        except ConnectionResetError:
            pass
    nodes.gather(first, second)

"""Which rank is blamed for a lost connection, and which one reports an error that several have."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.distributed import group, peer_failure, session
from pipeline.distributed.peer_failure import FAILED, LOST, FailureReport
from pipeline.errors import DataError, PeerError, RunError, ServiceError


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[FailureReport]:
    monkeypatch.setattr(peer_failure, "LISTEN_SECONDS", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [FailureReport(store, rank, 3) for rank in range(3)]


def test_a_rank_that_takes_long_to_close_everything_is_not_blamed(ranks: list[FailureReport]) -> None:
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:24994")
    ranks[0].post(lost)  # it has a checkpoint, tickets and a tracker to close, and will end later
    for rank, expected in ((1, True), (0, False)):
        error, is_reported_elsewhere = ranks[rank].end(lost)
        assert isinstance(error, PeerError) and "no response from rank 2 within 0.5 s:" in error.what
        assert is_reported_elsewhere == expected


def test_the_first_rank_that_fails_by_itself_reports_it(ranks: list[FailureReport]) -> None:
    errors = [DataError("damaged"), OSError("unreadable"), DataError("damaged")]
    ends = {rank: ranks[rank].end(errors[rank]) for rank in (2, 1, 0)}
    assert ends == {2: (errors[2], False), 1: (errors[1], True), 0: (errors[0], True)}


def test_what_another_rank_reports_does_not_make_this_one_the_first(ranks: list[FailureReport]) -> None:
    known = DataError("damaged", is_reported_elsewhere=True)
    assert ranks[1].end(known) == (known, True)
    own = OSError("unreadable")
    assert ranks[2].end(own) == (own, False)


def test_a_single_rank_reports_its_own_errors() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for error in (DataError("damaged"), RuntimeError("gloo: broken pipe")):
        assert FailureReport(store, 0, 1).end(error) == (error, False)


@pytest.mark.parametrize(("said", "kind"), [(FAILED, PeerError), (LOST, ServiceError), (None, ServiceError)])
def test_a_rank_that_ends_while_another_connects_is_not_taken_for_the_network(
    said: str | None, kind: type[RunError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_failure, "LISTEN_SECONDS", 0.5)
    store = dist.HashStore()
    report = FailureReport(store, here=0, num_ranks=2)
    for rank in range(2):
        store.set(f"rank {rank} is here", "")
    threading.Timer(0.1, lambda: said and store.set("failure of rank 1", said)).start()
    closed = RuntimeError("Gloo connectFullMesh failed with [pair.cc:561] Connection closed by peer [127.0.0.1]:25290")
    error = group._not_connected(closed, store, report, num_ranks=2, timeout_seconds=5)
    assert type(error) is kind
    assert error.is_reported_elsewhere is (said == FAILED)


def test_a_rank_that_waits_for_its_gpu_looks_whether_another_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOOK_SECONDS", 0.02)
    store = dist.HashStore()
    here, other = (FailureReport(store, rank, 2) for rank in (0, 1))
    never: Any = SimpleNamespace(query=lambda: False)  # a collective before it waits for the other rank
    threading.Timer(0.2, lambda: other.post(DataError("damaged"))).start()
    started = time.monotonic()
    with session.entered("cpu", here), pytest.raises(PeerError, match="another rank failed while") as caught:
        session._wait_for(never)
    assert 0.2 <= time.monotonic() - started < 5
    assert here.end(caught.value) == (caught.value, True)  # the other one reports it

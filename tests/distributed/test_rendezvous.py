"""Ranks that cannot rendezvous report where and why."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from pipeline.distributed import group
from pipeline.errors import PeerError, ServiceError


@pytest.mark.parametrize(("rank", "expected"), [("0", "address already in use"), ("1", "timed out")])
def test_a_taken_port_and_a_missing_rank_0_are_reported_in_one_line(
    rank: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == "0":
            taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        message = rf"the ranks could not rendezvous at 127\.0\.0\.1:{port}: .*{expected}"
        with pytest.raises(ServiceError, match=message) as caught, group.join(timeout_seconds=2):
            pass
    assert "\n" not in str(caught.value)


def test_a_rank_that_does_not_come_is_named_where_torchrun_keeps_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**environ, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    for is_reported_elsewhere in (False, True):  # of all ranks that waited in vain, the first one reports it
        with (
            pytest.raises(PeerError, match=r"^rank 1, 2 did not join within 1 s;") as caught,
            group.join(timeout_seconds=1),
        ):
            pass
        assert caught.value.is_reported_elsewhere == is_reported_elsewhere

"""Ranks that cannot meet say where and why."""

from __future__ import annotations

import socket

import pytest

from pipeline.distributed import session
from pipeline.errors import ServiceError


@pytest.mark.parametrize(("rank", "expected"), [("0", "address already in use"), ("1", "timed out")])
def test_a_taken_port_and_a_missing_rank_0_are_told_in_one_line(rank: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == "0":
            taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        message = rf"no rendezvous of the ranks at 127\.0\.0\.1:{port}: .*{expected}"
        with pytest.raises(ServiceError, match=message) as caught, session.session(timeout_seconds=2):
            pass
    assert "\n" not in str(caught.value)

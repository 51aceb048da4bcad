"""Who is blamed for a lost connection, and who tells an error that several ranks have."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pipeline.distributed import peer_failure
from pipeline.distributed.peer_failure import LastWords
from pipeline.errors import DataError


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[LastWords]:
    monkeypatch.setattr(peer_failure, "LAST_WORDS_SECONDS", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [LastWords(store, rank, 3) for rank in range(3)]


def test_a_rank_that_takes_long_to_close_everything_is_not_blamed(ranks: list[LastWords]) -> None:
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:24994")
    ranks[0].say(lost)  # it has a checkpoint, tickets and a tracker to close, and will end later
    told = [rank.end(lost) for rank in (ranks[1], ranks[0])]
    for error, is_told_elsewhere in zip(told, (True, False), strict=True):
        assert error is not None and "no word within 0.5 s from rank 2:" in error.what
        assert error.is_told_elsewhere == is_told_elsewhere


def test_the_first_rank_that_fails_by_itself_tells_it(ranks: list[LastWords]) -> None:
    errors = [DataError("damaged"), OSError("unreadable"), DataError("damaged")]
    assert [ranks[rank].end(errors[rank]) for rank in (2, 1, 0)] == [None, None, None]
    assert [getattr(error, "is_told_elsewhere", False) for error in errors] == [True, True, False]

"""What ranks tell each other when one of them ends by an error, so that the cause is told and not its consequences."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch._C._distributed_c10d import Store

from pipeline.errors import PeerError, RunError

LOST_PEER = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|timed out waiting|gloo|nccl", re.IGNORECASE
)
LOST, FAILED = "a collective failed", "failed by itself"
LAST_WORDS_SECONDS = 3.0  # how long a rank whose collective failed listens for why the others end


class LastWords:
    """Of this rank.

    ``say`` them as soon as there is an error, before anything is closed: that may take longer than
    others listen.
    """

    def __init__(self, store: Store, here: int, num_ranks: int) -> None:
        self._store, self._here = store, here
        self._others = [rank for rank in range(num_ranks) if rank != here]
        self._are_said = False
        self._is_teller = True  # unless another rank was faster

    def say(self, error: Exception) -> None:
        """Tell the other ranks why this one ends; of those that fail by themselves the first one speaks to people.

        Once is enough.
        """
        if self._are_said or not self._others:
            return
        self._are_said = True
        is_mine = not _is_lost(error)

        def post() -> None:
            with suppress(RuntimeError):  # whoever keeps the store is gone
                if is_mine and not getattr(error, "is_told_elsewhere", False):
                    self._is_teller = self._store.add("tellers", 1) == 1
                self._store.set(f"last words of {self._here}", FAILED if is_mine else LOST)

        _in_time(post)

    def end(self, error: Exception) -> PeerError | None:
        """Say them if they are not said, and when a collective has failed learn from the others whose fault it is.

        Returns None when it is this rank's; ``error`` then has ``is_told_elsewhere`` set if another
        rank is the one to tell its own.
        """
        self.say(error)
        if not self._others:
            return None
        is_lost = _is_lost(error)
        heard: dict[int, str] = {}
        is_answering = threading.Event()

        def listen() -> None:
            with suppress(RuntimeError):
                # rank 0 may be the one that keeps the store: it hears everybody out
                while len(heard) < len(self._others) and (self._here == 0 or FAILED not in heard.values()):
                    for other in self._others:
                        if other not in heard and self._store.check([f"last words of {other}"]):
                            heard[other] = self._store.get(f"last words of {other}").decode()
                    is_answering.set()
                    time.sleep(0.05)
                return
            is_answering.clear()

        if is_lost or self._here == 0:
            _in_time(listen)
        if not is_lost:
            if not self._is_teller:
                error.is_told_elsewhere = True  # type: ignore[attr-defined]
            return None
        silent = [other for other in self._others if other not in heard]
        who = (
            f"rank {', '.join(map(str, silent))}"
            if is_answering.is_set()
            else "the keeper of the store (rank 0, or its launcher)"
        )
        tellers = [self._here, *(other for other, word in heard.items() if word == LOST)]
        return PeerError(
            f"{_where(error)}: no word within {LAST_WORDS_SECONDS:g} s from {who}: {str(error).strip().splitlines()[0][:200]}",
            do="look at the nodes of these ranks; start all ranks again with --resume auto",
            is_told_elsewhere=min(tellers) != self._here or FAILED in heard.values(),
        )


def _is_lost(error: Exception) -> bool:
    return not isinstance(error, RunError) and isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))


def _in_time(exchange: Callable[[], None]) -> None:
    """The store may not answer at all."""
    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)


def _where(error: Exception) -> str:
    """The collective that failed: the innermost function of this project on the way to it."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(__file__).parents[1]) in frame.filename
    ]
    return f"the collective in {frames[-1].name} ({Path(frames[-1].filename).name})" if frames else "a collective"

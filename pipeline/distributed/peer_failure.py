"""Let ranks report to each other why they fail, so that users see the cause and not its consequences."""

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
LISTEN_SECONDS = 3.0  # how long a rank whose collective failed waits for the reports of others


class FailureReport:
    """This rank's report to the others, in the store through which the ranks connected.

    Call ``post`` as soon as there is an error, before anything is closed, which may take longer than
    the others wait.
    """

    def __init__(self, store: Store, here: int, num_ranks: int) -> None:
        self._store, self._here = store, here
        self._others = [rank for rank in range(num_ranks) if rank != here]
        self._is_posted = False
        self._is_first = True  # unless another rank was faster

    def is_first(self) -> bool:
        """Return True to the first rank that calls this, which is the one that reports its error to the user."""
        return self._store.add("reporting ranks", 1) == 1

    def is_any_reported(self) -> bool:
        """Return whether a rank has reported its error to the user; False if the store does not answer."""
        with suppress(RuntimeError):
            return bool(self._store.check(["reporting ranks"]))
        return False

    def post(self, error: Exception) -> None:
        """Report to the other ranks why this one ends, once."""
        if self._is_posted or not self._others:
            return
        self._is_posted = True
        is_mine = not _is_lost(error)

        def post() -> None:
            with suppress(RuntimeError):  # whoever keeps the store is gone
                if is_mine and not getattr(error, "is_reported_elsewhere", False):
                    self._is_first = self.is_first()
                self._store.set(f"failure of rank {self._here}", FAILED if is_mine else LOST)

        _in_time(post)

    def has_failed_peer(self) -> bool:
        """Return whether another rank reports, now or within LISTEN_SECONDS, that it failed by itself."""
        heard = threading.Event()

        def listen() -> None:
            end = time.monotonic() + LISTEN_SECONDS
            with suppress(RuntimeError):  # whoever keeps the store is gone
                while not heard.is_set() and time.monotonic() < end:
                    for key in (f"failure of rank {other}" for other in self._others):
                        if self._store.check([key]) and self._store.get(key).decode() == FAILED:
                            heard.set()
                    time.sleep(0.05)

        _in_time(listen)
        return heard.is_set()

    def end(self, error: Exception) -> tuple[Exception, bool]:
        """Post ``error`` if not done yet; if a collective failed, find out from the others which rank caused it.

        Returns:
            The error that ends this rank (a PeerError if a peer was lost), and whether another rank
            reports it.
        """
        self.post(error)
        is_lost = bool(self._others) and _is_lost(error)
        heard: dict[int, str] = {}
        is_answering = threading.Event()

        def listen() -> None:
            with suppress(RuntimeError):
                # rank 0 waits for all the others, because it may host the store
                while len(heard) < len(self._others) and (self._here == 0 or FAILED not in heard.values()):
                    for other in self._others:
                        if other not in heard and self._store.check([f"failure of rank {other}"]):
                            heard[other] = self._store.get(f"failure of rank {other}").decode()
                    is_answering.set()
                    time.sleep(0.05)
                return
            is_answering.clear()

        if self._others and (is_lost or self._here == 0):
            _in_time(listen)
        if not is_lost:
            return error, getattr(error, "is_reported_elsewhere", False) or not self._is_first
        silent = [other for other in self._others if other not in heard]
        who = (
            f"rank {', '.join(map(str, silent))}"
            if is_answering.is_set()
            else "the host of the store (rank 0, or its launcher)"
        )
        lost = [self._here, *(other for other, word in heard.items() if word == LOST)]
        cause = str(error).strip().splitlines()[0][:200]
        peer_error = PeerError(
            f"{_where(error)}: no response from {who} within {LISTEN_SECONDS:g} s: {cause}",
            do="check the nodes of these ranks; start all ranks again with --resume auto",
        )
        return peer_error, min(lost) != self._here or FAILED in heard.values()


def _is_lost(error: Exception) -> bool:
    return not isinstance(error, RunError) and isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))


def _in_time(exchange: Callable[[], None]) -> None:
    """Call ``exchange`` on a thread with a time limit, because the store may not respond at all."""
    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(LISTEN_SECONDS)


def _where(error: Exception) -> str:
    """Return the collective that failed, as the innermost function of this project in the traceback."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(__file__).parents[1]) in frame.filename
    ]
    return f"the collective in {frames[-1].name} ({Path(frames[-1].filename).name})" if frames else "a collective"

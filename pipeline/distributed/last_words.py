"""What ranks tell each other when one of them ends by an error, so that the cause is told and not its consequences."""

from __future__ import annotations

import re
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from torch._C._distributed_c10d import Store

from pipeline.errors import PeerError, RunError

LOST_PEER = re.compile(r"connection (closed|reset) by peer|connection refused|broken pipe|timed out waiting|gloo|nccl", re.IGNORECASE)
LOST, FAILED = "a collective failed", "failed by itself"
LAST_WORDS_SECONDS = 3.0  # how long a rank whose collective failed listens for why the others end


def last_words(error: Exception, store: Store, here: int, num_ranks: int) -> PeerError | None:
    """Tell the other ranks why this one ends, and when a collective has failed learn from them whose fault it is.

    Returns None when it is this rank's.
    """
    is_lost = not isinstance(error, RunError) and isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))
    others = [r for r in range(num_ranks) if r != here]
    heard: dict[int, str] = {}
    is_answering = threading.Event()

    def exchange() -> None:
        with suppress(RuntimeError):  # whoever keeps the store is gone
            store.set(f"last words of {here}", LOST if is_lost else FAILED)
            while len(heard) < len(others) and FAILED not in heard.values():
                for other in others:
                    if other not in heard and store.check([f"last words of {other}"]):
                        heard[other] = store.get(f"last words of {other}").decode()
                is_answering.set()
                if not is_lost and here != 0:  # rank 0 may be the one that keeps the store
                    return
                time.sleep(0.05)
            return
        is_answering.clear()

    listener = threading.Thread(target=exchange, daemon=True)  # the store may not answer at all
    listener.start()
    listener.join(LAST_WORDS_SECONDS)
    if not is_lost:
        return None
    silent = [other for other in others if other not in heard]
    who = f"rank {', '.join(map(str, silent))}" if is_answering.is_set() else "the keeper of the store (rank 0, or its launcher)"
    tellers = [here, *(other for other, word in heard.items() if word == LOST)]
    return PeerError(
        f"{_where(error)}: no word within {LAST_WORDS_SECONDS:g} s from {who}: {str(error).strip().splitlines()[0][:200]}",
        do="look at the nodes of these ranks; start all ranks again with --resume auto",
        is_told_elsewhere=min(tellers) != here or FAILED in heard.values(),
    )


def _where(error: Exception) -> str:
    """The collective that failed: the innermost function of this project on the way to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(__file__).parents[1]) in frame.filename]
    return f"the collective in {frames[-1].name} ({Path(frames[-1].filename).name})" if frames else "a collective"

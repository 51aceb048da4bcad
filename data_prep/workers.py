"""Run worker processes that can neither hang their parent nor outlive it.

There is one pipe per worker, and only that worker holds its other end: however the worker dies, the
parent reads the end of the pipe at once. With a shared queue (multiprocessing's pools, ffcv's
writer) the parent would wait forever.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np

from pipeline.errors import PeerError, RunError, WriteError

Send = Callable[[Any], None]


@dataclass(frozen=True)
class _End:
    """The last message of a worker: done (no error), or the error that ended it."""

    error: type[RunError] | None = None
    what: str = ""
    do: str = ""


def shared_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array of zeros that this process shares with the workers it starts.

    The memory has no name, so nothing is left behind however a run ends.
    """
    num_bytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=np.uint8)[:num_bytes].view(dtype).reshape(shape)


def run_workers(work: Callable[[int, Send], None], num_workers: int, *, receive: Callable[[Any], None]) -> None:
    """Run ``work(index, send)`` in ``num_workers`` processes and return when all are done.

    Args:
        work: runs in a worker, with the worker's number and a function that sends to this process.
        num_workers: number of processes.
        receive: called here with everything that the workers send.

    Raises:
        RunError: a worker raised it. No worker is left running.
        PeerError: a worker died. No worker is left running.
    """
    context = multiprocessing.get_context("fork")  # the work is a closure over the data set
    workers: dict[Connection, ForkProcess] = {}
    running: list[Connection] = []
    # a garbage collection in a worker would touch, and so copy, the list of all images that it
    # shares with its parent
    gc.freeze()
    try:
        for index in range(num_workers):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_run, args=(work, index, sender), daemon=True)
            worker.start()
            sender.close()  # before the next fork, so that only this worker holds it
            workers[receiver] = worker
            running.append(receiver)
        while running:
            ready = wait(running)
            for receiver in [receiver for receiver in running if receiver in ready]:
                message = _next_message(receiver, workers[receiver])
                if not isinstance(message, _End):
                    receive(message)
                elif message.error is not None:
                    raise message.error(message.what, do=message.do)
                else:
                    running.remove(receiver)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()
        gc.unfreeze()


def _next_message(receiver: Connection, worker: ForkProcess) -> Any:
    try:
        return receiver.recv()
    except (EOFError, OSError):  # the latter in the middle of a message
        worker.join()
        code = worker.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise PeerError(
            f"a worker process {how}", do="start it again, with fewer --workers if memory is short"
        ) from None


def _run(work: Callable[[int, Send], None], index: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        work(index, sender.send)
        end = _End()
    except RunError as error:
        end = _End(type(error), error.what, error.do)
    except OSError as error:
        end = _End(
            WriteError,
            f"{error.filename or 'output file'}: {error.strerror}",
            "free some disk space, or choose another --output",
        )
    except Exception as error:
        end = _End(RunError, f"worker process {index}: {type(error).__name__}: {error}", "report this as a bug")
    sender.send(end)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

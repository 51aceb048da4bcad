"""Run a worker script on several ranks, each a fork of one process that has imported everything.

They are real processes with real gloo; what torchrun and the imports of each rank would cost, half a
minute of processor for four ranks, is paid once.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.support.launch import ROOT, free_port, run


def run_ranks(worker: Path, *groups: tuple[int, Sequence[str | Path]], log: Path, timeout_seconds: float = 550) -> str:
    """Run ``worker ARGUMENTS`` on each group's number of ranks, one group after the other; return what was printed.

    Fails if a rank does not end with 0; the other ranks are then killed.
    """
    given = json.dumps([[num_ranks, [str(argument) for argument in arguments]] for num_ranks, arguments in groups])
    command = [sys.executable, "-m", "tests.support.forked", str(worker), given]
    return run(command, cwd=ROOT, log=log, timeout_seconds=timeout_seconds)


def _become_rank(worker: str, arguments: Sequence[str], place: dict[str, int]) -> None:
    os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    sys.argv = [worker, *arguments]
    code = 1
    try:
        runpy.run_path(worker, run_name="__main__")  # ends the process itself
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_group(worker: str, num_ranks: int, arguments: Sequence[str]) -> bool:
    """Return whether all ranks ended with 0."""
    place = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": free_port()}
    running = set[int]()
    for rank in range(num_ranks):
        if not (pid := os.fork()):
            _become_rank(worker, arguments, {**place, "RANK": rank, "LOCAL_RANK": rank})
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if os.waitstatus_to_exitcode(status):
            for other in running:
                os.kill(other, signal.SIGKILL)
            return False
    return True


def main(worker: str, given: str) -> int:
    os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR", DS_ACCELERATOR="cpu")
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(worker).parent))
    runpy.run_path(worker, run_name="imported")
    return 0 if all(_run_group(worker, *group) for group in json.loads(given)) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

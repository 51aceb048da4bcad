"""One rank of tests/launchers/test_restarts.py: adds up numbers of all ranks with gloo, and saves after each step.

python restarts_worker.py FOLDER --resume auto. It ends with 0 once FOLDER/finish is there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launchers.ending import ending
from pipeline.command_line import leave
from pipeline.distributed import group, session
from pipeline.files import write_atomically

PRIME = 2_147_483_647


def after(step: int, total: int, num_ranks: int) -> int:
    """Return the total after a step: it depends on all steps and their order."""
    return (31 * total + sum(step * (rank + 1) for rank in range(num_ranks))) % PRIME


def main(folder: Path) -> int:
    saved = folder / "saved"
    with ending() as end, group.join(timeout_seconds=60) as ranks:
        ranks.stop_on_signals()
        step, total = map(int, saved.read_text().split()) if saved.exists() else (0, 0)
        (folder / f"pid-{session.rank()}").write_text(str(os.getpid()))
        while not session.agree(is_finite=torch.tensor(True), is_stopping=(folder / "finish").exists())[1]:
            share = torch.tensor(step * (session.rank() + 1))
            dist.all_reduce(share)
            step, total = step + 1, (31 * total + int(share)) % PRIME
            if session.is_main():
                write_atomically(saved, f"{step} {total}".encode())
            if ranks.agree_to_stop():
                ranks.leave_preempted(f"saved after step {step}")
            time.sleep(0.02)
    return end.code


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))

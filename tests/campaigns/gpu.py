"""``python -m tests.campaigns.gpu``: the gate in all cells of its table, on one rank and on two.

Trains with every method and structure, and in further ways, on the emulated GPU and on the CPU
(``tests/gpu/gate.py``), and prints for each cell: ok, what differs or is over its budget, or why the
combination is refused. Ends with 1 if anything differs or is over its budget.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.command_line import ArgumentParser
from tests.gpu import gate
from tests.support.launch import ROOT, command, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in the cells; return the exit code."""
    parser = ArgumentParser(prog="python -m tests.campaigns.gpu", description=str(__doc__), allow_abbrev=False)
    parser.parse_args(arguments)
    torch.set_num_threads(1)
    possible = [name for name, cell in gate.CELLS.items() if not cell.reason]
    worker = ROOT / "tests" / "gpu" / "gate_worker.py"
    with tempfile.TemporaryDirectory() as folder:
        run(command("torchrun", worker, [folder, *possible], ranks=2), log=Path(folder, "log"), timeout_seconds=3600)
        two = json.loads(Path(folder, "rank-0.json").read_text())
    num_bad = 0
    for name, cell in gate.CELLS.items():
        if cell.reason:
            print(f"{name}: refused: {cell.reason}")
            continue
        on_cpu, on_gpu = gate.train(cell, "cpu"), gate.train(cell, "cuda")
        problems = gate.differences(cell, on_cpu, on_gpu) + gate.over_budget(cell, on_gpu.counts, num_ranks=1)
        problems += [f"two ranks: {problem}" for problem in two[name]["problems"]]
        num_bad += bool(problems)
        print(f"{name}: {'; '.join(problems) or 'ok'}", flush=True)
    print(f"{len(possible) - num_bad} of {len(possible)} cells are ok, {len(gate.CELLS) - len(possible)} are refused")
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main())

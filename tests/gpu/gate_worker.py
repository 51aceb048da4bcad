"""One of two ranks that train on the CPU and on the emulated GPU, and write down what differs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.command_line import leave
from pipeline.distributed import group, session
from pipeline.engine.torch_engine import TorchEngine
from pipeline.errors import RunError
from tests.gpu import gate
from tests.gpu.planted import planted
from tests.support.emulated_gpu import GpuError


def _ended(cell: gate.Cell) -> str:
    """Train in ``cell`` on the emulated GPU; return how that ended."""
    try:
        gate.train(cell, "cuda")
    except (GpuError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def _checked() -> str:
    """Flip a bit of a mask on rank 1 and check; return what both ranks say."""
    with gate.on("cuda"):
        sparsifier = gate.Trainer(gate.TABLE["rigl, none"]).sparsifier
        sparsifier.check()
        if session.rank() == 1:
            sparsifier.masks["0.weight"][0, 0, 0, 0] ^= True
        try:
            sparsifier.check()
        except RunError as error:
            return str(error)
    return "well"


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with group.join(threads_per_rank=1, on="cpu"):
        for cell in (gate.CELLS[name] for name in names):
            on_cpu, on_gpu = gate.train(cell, "cpu"), gate.train(cell, "cuda")
            problems = gate.differences(cell, on_cpu, on_gpu) + gate.over_budget(cell, on_gpu.counts, num_ranks=2)
            waits = {kind: [str(wait) for wait in count.waits] for kind, count in on_gpu.counts.items()}
            results[cell.name] = {"problems": problems, "waits": waits}
        results["rest"] = [gate.rest_of_a_run(folder / device, device) for device in ("cpu", "cuda")]
        results["a mask of another rank"] = _checked()
        rigl = gate.TABLE["rigl, none"]
        with planted(session, "_on_device", "device=device()", 'device="cpu"'):
            results["a host tensor in a collective"] = _ended(rigl)
        renamed = '{f"_orig_mod.{name}": mask for name, mask in masks.items()}'
        with planted(TorchEngine, "use_masks", "use_masks(masks)", f"use_masks({renamed})"):
            results["a mask by a stale name"] = _ended(rigl)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)

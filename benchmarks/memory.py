"""Measure the memory that masks occupy and the peak of an update, in a process of its own.

``python -m benchmarks.memory resnet50 rigl layer cpu``
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.support.bars import Figure, Leg
from benchmarks.support.workload import Published, Setup, Workload


def measure(model: str, method: str, scope: str, device: str = "cpu") -> Figure:
    """Measure ``model`` under ``method``, beside the published way.

    Returns:
        Bytes that the Sparsifier holds, and the peak of an update above them.
    """
    # Without this, glibc keeps freed blocks of some MB for later, which would hide new allocations.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, "-m", "benchmarks.memory", model, method, scope, device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    ours = f"{_mb(numbers['resident'], numbers)} held, {_mb(numbers['update_peak'], numbers)} more during an update"
    published = f"{_mb(numbers['published_resident'], numbers)} and {_mb(numbers['published_update_peak'], numbers)}"
    return Figure(f"memory {method} {scope} {model}", f"{ours}; published {published}", numbers)


def _mb(num_bytes: float, numbers: dict[str, float]) -> str:
    return f"{num_bytes / 1e6:.0f} MB ({num_bytes / numbers['num_weights']:.1f} B per weight)"


def main() -> None:
    model, method, scope, device = sys.argv[1:]
    torch.set_num_threads(1)
    workload = Workload.named(model, device)
    setup = Setup(workload, method, scope)
    setup.update()  # what the first update loads or compiles is not memory of the masks
    sparsifier = setup.sparsifier
    setup.refresh()
    numbers: dict[str, float] = {
        "num_weights": workload.num_weights,
        "resident": _bytes_of(
            [*sparsifier.masks.values(), *sparsifier.ever_active.values(), *sparsifier.tensors().values()]
        ),
        "update_peak": _peak_above(setup.update, device),
    }
    setup.refresh()
    published = Published(setup)
    numbers["published_resident"] = _bytes_of(list(published.masks.values()))
    numbers["published_update_peak"] = _peak_above(published.update_by_gradient, device)
    print(json.dumps(numbers))


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak_above(leg: Leg, device: str) -> int:
    """Return the peak of the bytes in use during ``leg``, above those in use before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        leg()
        return int(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM) to the present size
    before = _status("VmRSS")
    leg()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()

"""Starts the ranks of a measurement: ``python -m MODULE TASK.json OUTPUT.json``; rank 0 answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def answer_of(
    module: str,
    task: Mapping[str, Any],
    *,
    environ: dict[str, str],
    commands: Sequence[Callable[[list[str]], list[str]]],
) -> Any:
    """Run ``task`` in ``module`` on several ranks.

    ``commands`` has one function per rank, which turns a command line into one that runs on the right
    host.

    Returns:
        What rank 0 writes to OUTPUT.json.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        output, log = Path(folder) / "output.json", Path(folder) / "log"
        command = [sys.executable, "-m", module, json.dumps(task), str(output)]
        common = os.environ | {"WORLD_SIZE": str(len(commands)), "TORCH_CPP_LOG_LEVEL": "ERROR"} | environ
        with log.open("ab") as file:
            processes = [
                subprocess.Popen(place(command), env=common | {"RANK": str(rank)}, stdout=file, stderr=file)
                for rank, place in enumerate(commands)
            ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"{log.read_text(errors='replace')[-3000:]}\na rank of {task} ended with {codes}")
        return json.loads(output.read_text())

"""Write the crash file: what is needed to understand an unexpected error, without secrets."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.errors import RunError
from pipeline.files import open_regular, write_atomically
from pipeline.lazy import installed_version
from pipeline.limits import usable_cpus
from pipeline.redaction import REDACTED, SECRET_KEY, redact

# Only variables that say how the run was started are shown, because a secret can have any name.
SHOWN = (
    *(
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "GROUP_",
        "NODE_",
        "MASTER_",
        "JOB_COMPLETION_INDEX",
        "SLURM_",
        "TICKETWORKS_",
        "MLFLOW_",
        "DS_",
    ),
    *(
        "OMP_",
        "MKL_",
        "KMP_",
        "GLOO_",
        "NCCL_",
        "CUDA_",
        "CUBLAS_",
        "TORCH",
        "PYTORCH_",
        "NUMBA_",
        "PYTHON",
        "LANG",
        "LC_",
        "TMPDIR",
    ),
)
LIBRARIES = ("ticketworks", "torch", "torchvision", "numpy", "ffcv", "deepspeed", "mlflow", "omegaconf", "safetensors")
METRICS = "metrics.jsonl"  # of pipeline.tracking
LAST_RECORDS, LAST_BYTES = 20, 1 << 16


def write_crash_file(
    error: BaseException, *, output_dir: Path | None, config: Config | None, rank: str, step: int | None
) -> str:
    """Write ``crash-rank<rank>.txt`` to the run's folder, or else a file in the temporary folder.

    Returns:
        The path of the file; empty if none could be written, which is not an error.
    """
    try:
        sections = {
            "run": f"rank {rank}, step {step}, argv {json.dumps(sys.argv)}",
            "traceback": "".join(traceback.format_exception(error)),
            "configuration": "not read" if config is None else to_yaml(config),
            f"last records of {METRICS}": "\n".join(_last_records(output_dir)) or "none",
            "environment": "\n".join(_environment()),
            "versions": "\n".join(f"{name} {installed_version(name)}" for name in LIBRARIES),
        }
        content = redact("\n\n".join(f"== {title}\n{text.rstrip()}" for title, text in sections.items()) + "\n").encode(
            errors="replace"
        )
        # not is_dir, which raises where this user may not even look
        if output_dir is not None and os.access(output_dir, os.W_OK | os.X_OK):
            path = output_dir / f"crash-rank{rank}.txt"
            with contextlib.suppress(OSError, RunError):  # a full disk may be what ended the run
                write_atomically(path, content)
                return str(path)
        descriptor, name = tempfile.mkstemp(prefix=f"ticketworks-crash-rank{rank}-", suffix=".txt")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return name
    except (OSError, RunError, ValueError):
        return ""


def _last_records(output_dir: Path | None) -> list[str]:
    """Return the last records of steps, and of anything else that the run logged at its end."""
    try:
        with open_regular(Path(output_dir or "", METRICS)) as file:
            start = max(0, os.fstat(file.fileno()).st_size - LAST_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return []
    return lines[bool(start) :][-LAST_RECORDS:]


def _environment() -> Iterator[str]:
    yield f"python {platform.python_version()}, {platform.platform()}, {usable_cpus()} of {os.cpu_count()} CPUs"
    for name, value in sorted(os.environ.items()):
        if name.startswith(SHOWN):
            yield f"{name}={REDACTED if SECRET_KEY.search(name) else value}"

"""The NVIDIA GPUs of this machine, as its files and variables show them. Standard library only."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")  # exists where the driver is loaded
WSL = "dxg"  # the one device file of the Windows Subsystem for Linux, whatever the number of GPUs
SMI_SECONDS = 10


def device_files() -> list[Path]:
    """Return the files through which programs reach GPUs: ``/dev/nvidia0``, …, or ``/dev/dxg``."""
    numbered = [path for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return sorted(numbered) or [path for path in (DEVICES / WSL,) if path.exists()]


def visible(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves to this process; None: it is not set, so all.

    CUDA ignores what follows an invalid entry such as ``-1``. It opens at most one MIG instance.
    """
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    found: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry):
            break
        found.append(entry)
    return found[:1] if found and found[0].startswith("MIG-") else found


def num_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of GPUs that this process may use, without importing torch."""
    files, chosen = device_files(), visible(environ)
    if chosen is not None:
        return len(chosen)
    if [path.name for path in files] == [WSL]:
        return max(1, len(re.findall(r"^GPU \d+:", _nvidia_smi("-L"), re.MULTILINE)))
    return len(files)


def driver_version() -> str:
    """Return the version of the NVIDIA driver, such as ``580.65.06``; empty if it cannot be found out."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text(errors="replace"))
    except OSError:
        found = re.search(r"Driver Version: (\d+\.\d+(?:\.\d+)?)", _nvidia_smi())
    return found[1] if found else ""


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout

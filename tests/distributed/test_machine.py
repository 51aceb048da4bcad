"""What a run needs from the machine, and the deterministic mode."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline.distributed import machine

WARN = (
    "import logging; logging.basicConfig(); from pipeline.distributed.machine import warn_of_small_shared_memory as w;"
    " w(1); w({ranks})"
)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(2, ""), (8, "/dev/shm: 64 MiB are free, but 8 ranks may need 256: give the container more")],
)
def test_little_shared_memory_is_reported(ranks: int, expected: str) -> None:
    """On a real file system, as large as in a container."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "--mount", "sh", "-c", mount, "sh", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", WARN.format(ranks=ranks)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert expected in told if expected else told == ""


STAYS = """
import ctypes, os, pathlib, sys
from pipeline.distributed.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
before = resident()
for _ in range(3):
    for block in [ctypes.memset(libc.malloc(20 << 20), 1, 20 << 20) for _ in range(6)][::-1]:
        libc.free(block)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_stays_with_the_process() -> None:
    """120 MiB in blocks of 20 are still resident after they are freed; glibc by default returns them."""
    stays = {
        mode: int(
            subprocess.run([sys.executable, "-c", STAYS, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("keep", "give back")
    }
    assert stays["give back"] < 40 < 115 < stays["keep"]


def test_the_deterministic_mode_sets_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    try:
        machine.make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


ARITHMETIC = """
import ctypes, logging, torch
from pipeline.distributed.machine import set_arithmetic
logging.basicConfig()
torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
tiny = torch.full((3,), 1e-40)
torch.set_flush_denormal(True)  # as a library built with -ffast-math does when it is loaded
before = [torch.get_float32_matmul_precision(), float((tiny * 1).sum())]
set_arithmetic()
after = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]
print(before, after, float((tiny * 1).sum()) > 0)
"""


def test_arithmetic_is_set_whatever_the_environment_says() -> None:
    environ = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    done = subprocess.run([sys.executable, "-c", ARITHMETIC], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['high', 0.0] ['highest', True, False] True"
    assert "ONEDNN_DEFAULT_FPMATH_MODE=BF16 changes how float32 is computed" in done.stderr

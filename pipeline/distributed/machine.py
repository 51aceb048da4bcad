"""The machine around this rank: what its numbers depend on, and what it must offer. Needs torch only."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = (
    32 << 20
)  # for NCCL, of each rank of a node, generously; a container has 64 MiB unless told otherwise


def device_name() -> str:
    """What a change of would end bit-exactness: the GPU's name, or the CPU's capability."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )


def make_deterministic() -> None:
    """From now on torch, cuDNN and cuBLAS compute the same bits from the same inputs, or raise RuntimeError where they cannot.

    Before the first use of a GPU. For the same bits in another process the hardware, its number and
    its links must be the same, too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """From now on this process keeps the memory that it frees, instead of giving it back and having every page of it cleared once more.

    Where gradients are freed as soon as they have been sent, that is 8,000 page faults a step of
    ResNet-18, a tenth of backward on a CPU. glibc only: elsewhere nothing happens.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOC_MMAP_THRESHOLD, 32 << 20)  # its highest value; to set either ends that glibc moves it
        mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def warn_of_small_shared_memory(ranks_here: int) -> None:
    """Say so when the ranks of this node may not find the shared memory that NCCL talks through."""
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ranks_here * SHARED_MEMORY_BYTES
    if ranks_here > 1 and free < needed:
        logger.warning(
            "%s: %d MiB are free, %d ranks may need %d: give the container more (docker --shm-size, an emptyDir of medium Memory)",
            SHARED_MEMORY,
            free >> 20,
            ranks_here,
            needed >> 20,
        )


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Set up and describe the machine of this rank: determinism, memory, ports. Needs torch only."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
# Variables with which CUDA's libraries and oneDNN compute float32 less precisely, whatever torch is told.
HIDDEN_PRECISION = ("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
# Variables that limit the instructions of torch, oneDNN and MKL.
ISA_LIMITS = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    "GLIBC_TUNABLES",
)
VECTOR_FLAGS = re.compile(r"\b(?:avx\w*|amx\w*|fma\w*|asimd\w*|sve\w*|bf16|i8mm)\b")
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 32 << 20  # ample for NCCL, per rank of a node; a container has 64 MiB by default


def device_name(device: torch.device) -> str:
    """Return the hardware whose change breaks bit-exactness: name of the GPU, or capability of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def processor() -> dict[str, str]:
    """Return the CPU, its vector instructions, and the variables that limit which of them libraries use.

    The order of additions in a sum depends on them, and so do the last bits of a run on CPUs.
    """
    name, flags = platform.machine(), ""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            if key in ("flags", "Features"):
                flags = " ".join(sorted(set(VECTOR_FLAGS.findall(value))))
                break
    limits = " ".join(f"{name}={os.environ[name]}" for name in ISA_LIMITS if os.environ.get(name))
    return {"cpu": name, "cpu_flags": flags, "isa_limits": limits}


def set_arithmetic() -> None:
    """Set what torch otherwise takes from the environment or from a library that was loaded before.

    The values are torch's own defaults: whole float32 in matrix products, TF32 in cuDNN's
    convolutions, cuDNN's first algorithm, subnormal numbers kept. Call it before any thread of
    torch exists, because threads inherit how their maker treats subnormal numbers.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.set_flush_denormal(False)
    if given := [f"{name}={os.environ[name]}" for name in HIDDEN_PRECISION if os.environ.get(name)]:
        logger.warning("%s changes how float32 is computed: unset it for the results of other machines", given[0])


def set_gpu_arithmetic(*, tf32: str, cudnn_benchmark: bool) -> None:
    """Set how this process computes on a GPU.

    Args:
        tf32: which float32 operations round their inputs to TF32, with 10 bits of mantissa in place of
            23, on GPUs that have it: ``none``, ``convolutions`` (torch's default) or ``all``, which adds
            matrix products.
        cudnn_benchmark: whether cuDNN measures its algorithms for every new shape, and takes
            the fastest, in place of its first choice. Which one is fastest may differ from run to run.
    """
    torch.backends.cudnn.allow_tf32 = tf32 != "none"
    torch.backends.cuda.matmul.allow_tf32 = tf32 == "all"
    torch.backends.cudnn.benchmark = cudnn_benchmark


def make_deterministic() -> None:
    """Make torch, cuDNN and cuBLAS deterministic; operations that cannot be raise RuntimeError.

    Call it before the first use of a GPU. Another process computes the same bits only on the same
    number of the same GPUs with the same links.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Make this process reuse freed memory, instead of returning it and having every page cleared again.

    Gradients are freed as soon as they have been sent. This saves 8,000 page faults per step of
    ResNet-18, a tenth of the backward pass on a CPU. Works with glibc only and does nothing elsewhere.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOC_MMAP_THRESHOLD, 32 << 20)  # the highest value; setting either stops glibc from adjusting it
        mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def warn_of_small_shared_memory(ranks_here: int) -> None:
    """Warn if the ranks of this node may run out of the shared memory that NCCL uses."""
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ranks_here * SHARED_MEMORY_BYTES
    if ranks_here > 1 and free < needed:
        logger.warning(
            "%s: %d MiB are free, but %d ranks may need %d: give the container more (docker --shm-size, or an emptyDir "
            "of medium Memory)",
            SHARED_MEMORY,
            free >> 20,
            ranks_here,
            needed >> 20,
        )

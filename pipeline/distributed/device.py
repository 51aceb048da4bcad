"""Choose what a rank computes on, and agree on it with the other ranks before they make a process group.

Needs torch only. Every rank puts its :class:`Choice` into the store when it joins, and reads those of
all ranks. So a rank whose GPU cannot be used ends all ranks with its reason, and a world of some ranks
on GPUs and others on CPUs, which would wait for each other until the time-out, ends in one line.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import Store

from pipeline.distributed import gpus
from pipeline.distributed.machine import processor
from pipeline.errors import ConfigError, ServiceError

AUTO, CUDA, CPU = "auto", "cuda", "cpu"
# The first series of NVIDIA's drivers for the CUDA that a torch wheel was built with, by major version.
DRIVER_SERIES = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True)
class Choice:
    """What one rank computes on, in words for the other ranks and for the log."""

    kind: str  # "cuda" or "cpu"
    name: str = ""  # of the device, with its memory
    software: str = ""  # driver, CUDA, NCCL
    problem: str = ""  # why ``kind`` cannot be used; empty: it can
    do: str = ""  # what to do about it


def choose(wanted: str, local_rank: int) -> Choice:
    """Choose the device of this rank, and make its GPU the current one.

    Args:
        wanted: ``cuda``, ``cpu`` or ``auto``: a GPU if the machine has any, unless
            ``CUDA_VISIBLE_DEVICES`` hides them all.
        local_rank: of this rank on its node. A scheduler may show all GPUs of the node to every rank,
            or to each rank its own alone.
    """
    files, chosen = gpus.device_files(), gpus.visible()
    if wanted == CPU or (wanted == AUTO and not torch.cuda.is_available() and (not files or chosen == [])):
        threads = torch.get_num_threads()
        return Choice(CPU, processor()["cpu"], f"{threads} thread{'s' * (threads > 1)} per rank")
    if not torch.cuda.is_available():
        return _unusable([str(path) for path in files], chosen)
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {
        "driver": gpus.driver_version(),
        "CUDA": torch.version.cuda or "",
        "NCCL": _nccl_version(),
    }
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return Choice(CUDA, f"{found.name} ({found.total_memory / 2**30:.0f} GiB)", known)


def _unusable(files: Sequence[str], chosen: Sequence[str] | None) -> Choice:
    """Return the choice of a GPU that torch cannot use, with what is known of the reason."""
    built = torch.version.cuda
    reason = ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = f": {str(error).strip().splitlines()[0][:160]}"
    seen = ", ".join(
        filter(
            None,
            (
                ", ".join(files[:2]) + (f" and {len(files) - 2} more" if len(files) > 2 else "") or "no /dev/nvidia*",
                f"driver {version}" if (version := gpus.driver_version()) else "no driver found",
                "" if chosen is None else f"CUDA_VISIBLE_DEVICES={','.join(chosen)!r}",
            ),
        )
    )
    wheel = f"built for CUDA {built}" if built else "built without CUDA"
    series = DRIVER_SERIES.get((built or "").partition(".")[0])
    do = f"install an NVIDIA driver of series {series} or newer, or a torch for the driver that is there"
    return Choice(
        CUDA,
        problem=f"no GPU can be used: torch {torch.__version__} ({wheel}), on this machine {seen}{reason}",
        do=f"{do if series else 'install a torch with CUDA'}; train.device=cpu computes on the CPU",
    )


def _nccl_version() -> str:
    if not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def post(store: Store, here: int, choice: Choice) -> None:
    """Say in the store that this rank is here, and what it computes on."""
    store.set(f"rank {here} is here", json.dumps(dataclasses.asdict(choice)))


def require_one_kind(store: Store, here: int, num_ranks: int) -> list[Choice]:
    """Return the choices of all ranks, by rank, once all have posted theirs.

    Raises:
        ServiceError: on every rank, if a rank cannot use its GPU; that rank reports it.
        ConfigError: on every rank, if some ranks compute on GPUs and others on CPUs; rank 0 reports it.
    """
    found = store.multi_get([f"rank {rank} is here" for rank in range(num_ranks)])
    choices = [Choice(**json.loads(content)) for content in found]
    for rank, choice in enumerate(choices):
        if choice.problem:
            raise ServiceError(choice.problem, do=choice.do, is_reported_elsewhere=rank != here)
    of_kind = {kind: [rank for rank, choice in enumerate(choices) if choice.kind == kind] for kind in (CUDA, CPU)}
    if all(of_kind.values()):
        raise ConfigError(
            f"{_ranks(of_kind[CUDA])} compute on GPUs, {_ranks(of_kind[CPU])} on CPUs; expected one kind of device",
            do="set train.device=cuda, which reports why a GPU cannot be used, or train.device=cpu",
            is_reported_elsewhere=here != 0,
        )
    return choices


def summary(choices: Sequence[Choice], backend: str) -> str:
    """Return one line about the devices of all ranks, for the log."""
    names = Counter(choice.name for choice in choices)
    devices = ", ".join(f"{num} × {name}" if len(choices) > 1 else name for name, num in names.items())
    software = " or ".join(dict.fromkeys(choice.software for choice in choices))
    num = "1 rank" if len(choices) == 1 else f"{len(choices)} ranks"
    return f"{num} on {choices[0].kind} ({backend}): {devices}; {software}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}" + (
        f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    )

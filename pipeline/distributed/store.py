"""Open the store through which ranks find each other, without torch's stacks of C++. Needs torch only."""

from __future__ import annotations

import datetime
import os
import socket
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from pipeline.distributed.rank_variables import require_resolvable
from pipeline.errors import ConfigError, ServiceError

RETRY_SECONDS = 0.1
CONFLICT = "two ranks have one GPU"


def open_store(timeout_seconds: float) -> tuple[Store, int, int]:
    """Open the store at ``MASTER_ADDR`` and ``MASTER_PORT``; return it, this rank and the number of ranks.

    Raises:
        ConfigError: the name does not resolve.
        ServiceError: the port is taken, or rank 0 cannot be reached.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    require_resolvable(host, f"MASTER_ADDR={host!r}")
    try:
        if os.environ["RANK"] != "0":
            _wait_for_rank_0(host, port, timeout_seconds)
        store: Store
        store, here, num_ranks = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_seconds)))
    except (dist.DistError, OSError) as error:
        raise ServiceError(
            f"the ranks could not rendezvous at {host}:{port}: {str(error).splitlines()[0][:200]}",
            do="choose another port (MASTER_PORT, or --master_port of the launcher), or check that rank 0 is running "
            "and reachable",
        ) from error
    return store, here, num_ranks


def _wait_for_rank_0(host: str, port: int, timeout_seconds: float) -> None:
    """Wait until rank 0 accepts connections, as torch does, but torch prints a stack of C++ where it gives up."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(RETRY_SECONDS, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"timed out after {timeout_seconds:g} s: {error.strerror or error}") from None
            time.sleep(RETRY_SECONDS)
        else:
            return


def claim_gpu(store: Store, here: int, local_rank: int) -> None:
    """Note in the store that this rank uses the current GPU, and whether another one does so."""
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    owner = store.compare_set(f"owner of GPU {gpu}", "", str(here)).decode()
    if owner != str(here):
        store.set(CONFLICT, f"rank {here} (local rank {local_rank}) has the GPU of rank {owner}: {gpu}")


def require_own_gpus(store: Store) -> None:
    """Check, once every rank has claimed its GPU, that no two have the same, with which NCCL would fail.

    Raises:
        ConfigError: on every rank.
    """
    if store.check([CONFLICT]):
        raise ConfigError(
            store.get(CONFLICT).decode(),
            do="start at most one rank per GPU; with srun, --gpus-per-task 1 gives each task its own",
        )

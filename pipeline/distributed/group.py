"""Join and leave the process group. Needs torch only."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from pipeline.distributed import device as devices
from pipeline.distributed.machine import (
    keep_freed_memory,
    make_deterministic,
    set_arithmetic,
    set_gpu_arithmetic,
    warn_of_small_shared_memory,
)
from pipeline.distributed.peer_failure import FailureReport
from pipeline.distributed.rank_variables import alone_without_launcher, take_place
from pipeline.distributed.session import Session, entered, is_main, local_rank
from pipeline.distributed.store import claim_gpu, open_store, require_own_gpus
from pipeline.errors import ConfigError, PeerError, RunError, ServiceError, SessionEnd, set_session_end
from pipeline.limits import ranks_on_this_node, threads_of_rank

logger = logging.getLogger(__name__)


@contextmanager
def join(
    *,
    timeout_seconds: float = 300.0,
    threads_per_rank: int = 0,
    is_deterministic: bool = False,
    on: str = devices.AUTO,
    backend: str = devices.AUTO,
    tf32: str = "convolutions",
    cudnn_benchmark: bool = True,
) -> Iterator[Session]:
    """Join the process group described by the launcher (``rank_variables``); leave it at the end.

    Under plain ``python`` the group has one rank.

    Args:
        timeout_seconds: limit for every collective.
        threads_per_rank: CPU threads, on which the numbers of a CPU run depend; 0: what
            ``OMP_NUM_THREADS`` says, or else an equal share of the usable CPUs of this node.
        is_deterministic: use deterministic GPU operations.
        on: what the ranks compute on, ``auto``, ``cuda`` or ``cpu``; see ``device.choose``.
        backend: ``nccl``, ``gloo`` or ``auto``: NCCL on GPUs, gloo on CPUs. With gloo, ranks may share a GPU.
        tf32: see ``machine.set_gpu_arithmetic``.
        cudnn_benchmark: the same; not used where ``is_deterministic``.

    Raises:
        ConfigError: what the launcher has set is not enough, two ranks have one GPU and NCCL, or some ranks
            compute on GPUs and others on CPUs.
        ServiceError: the ranks cannot connect, or the GPU of one cannot be used.
        PeerError: a rank did not join, or was lost in the block.
    """
    keep_freed_memory()
    set_arithmetic()
    if is_deterministic:
        make_deterministic()
    take_place()
    with alone_without_launcher():
        torch.set_num_threads(threads_of_rank(threads_per_rank))
        choice = devices.choose(on, local_rank())
        if backend == devices.AUTO:
            backend = "nccl" if choice.kind == devices.CUDA else "gloo"
        if choice.kind == devices.CUDA and not choice.problem:
            set_gpu_arithmetic(tf32=tf32, cudnn_benchmark=cudnn_benchmark and not is_deterministic)
        if backend == "nccl" and local_rank() == 0:
            warn_of_small_shared_memory(ranks_on_this_node())
        with _joined(choice, backend, timeout_seconds) as joined:
            yield joined


@contextmanager
def _joined(choice: devices.Choice, backend: str, timeout_seconds: float) -> Iterator[Session]:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store, here, num_ranks = open_store(timeout_seconds)
    failure_report = FailureReport(store, here, num_ranks)
    try:
        if backend == "nccl" and choice.kind == devices.CUDA and not choice.problem:
            claim_gpu(store, here, local_rank())
        devices.post(store, here, choice)
        store.wait([f"rank {each} is here" for each in range(num_ranks)], timeout)  # before gloo begins to connect
        choices = devices.require_one_kind(store, here, num_ranks)
        if backend == "nccl":
            if choice.kind == devices.CPU:
                raise ConfigError("the backend nccl needs GPUs, and there is none", do="set train.backend=auto")
            require_own_gpus(store)
        # with its device, NCCL connects now, where an error has one line, and not in the first collective
        at = torch.device(devices.CUDA, torch.cuda.current_device()) if backend == "nccl" else None
        dist.init_process_group(backend, store=store, rank=here, world_size=num_ranks, timeout=timeout, device_id=at)
    except (ConfigError, ServiceError) as error:
        ending, is_reported_elsewhere = failure_report.end(error)
        set_session_end(ending, SessionEnd(None, is_reported_elsewhere))
        raise
    except RuntimeError as error:
        raise _not_connected(error, store, failure_report, num_ranks, timeout_seconds) from error
    joined = Session(failure_report)
    if is_main():
        logger.info("device: %s", devices.summary(choices, backend))
    try:
        with entered(choice.kind, failure_report):
            yield joined
    except BaseException as error:
        if backend == "gloo":  # with nccl this may wait for collectives that will never end
            dist.destroy_process_group()
        if isinstance(error, Exception):
            ending, is_reported_elsewhere = failure_report.end(error)
            set_session_end(ending, SessionEnd(joined.step, is_reported_elsewhere))
            if ending is not error:
                raise ending from error
        raise
    dist.destroy_process_group()


def _not_connected(
    error: RuntimeError, store: Store, failure_report: FailureReport, num_ranks: int, timeout_seconds: float
) -> RunError:
    """Return the error for ranks that have a store, but no process group; one rank reports it.

    torchrun hosts the store, so that it responds even if ranks are missing.
    """
    if "by peer" in str(error) and failure_report.has_failed_peer():  # it ended before all had connected
        return PeerError(
            "another rank failed while the ranks connected",
            do="read the line of the rank that failed",
            is_reported_elsewhere=True,
        )
    missing: list[int] = []
    is_reported_elsewhere = False
    with suppress(RuntimeError):
        is_reported_elsewhere = not failure_report.is_first()
        missing = [other for other in range(num_ranks) if not store.check([f"rank {other} is here"])]
    if missing:
        who = f"rank {', '.join(map(str, missing[:8]))}" + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return PeerError(
            f"{who} did not join within {timeout_seconds:g} s",
            do="check the nodes of these ranks; start all ranks again",
            is_reported_elsewhere=is_reported_elsewhere,
        )
    return ServiceError(
        f"the ranks found each other but cannot connect: {' '.join(str(error).split())[:200]}",
        do="check the network between their nodes; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME chooses the interface",
        is_reported_elsewhere=is_reported_elsewhere,
    )

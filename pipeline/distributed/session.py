"""Join and leave the process group, rank helpers, and small agreements between ranks. Needs torch only.

:func:`session` yields a :class:`Session`, which holds the state of the group. Every helper also works
without a process group, as rank 0 of 1, so that a user's own single-process loop needs no set-up.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
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
from pipeline.distributed.store import claim_gpu, open_store, require_own_gpus
from pipeline.errors import (
    ConfigError,
    IntegrityError,
    NumericsError,
    PeerError,
    Preempted,
    RunError,
    ServiceError,
    SessionEnd,
    set_session_end,
)
from pipeline.limits import ranks_on_this_node, threads_of_rank

T = TypeVar("T")

logger = logging.getLogger(__name__)

RESUME = "start again with --resume auto"
_kind = ""  # of device that the ranks of the session have agreed on; empty outside of a session


class Stopwatch:
    """Adds up the time spent in ``with stopwatch: …``. ``seconds`` may be reset to zero at any time."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class _Verdict:
    """What the ranks have agreed on about a step.

    ``flags``, float32 [2] on the host, say whether a value is not finite and whether to stop; they can be read
    once the device has passed ``is_sent``, on a CPU at once.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    flags: Tensor
    is_sent: torch.cuda.Event | None

    def read(self) -> tuple[bool, bool]:
        if self.is_sent is not None:
            self.is_sent.synchronize()
        not_finite, is_stopping = self.flags.tolist()
        return bool(not_finite), bool(is_stopping)


class Session:
    """The state of a process group that this process has joined. ``Session()`` is that of a single process.

    Attributes:
        step: current step of training, for error messages; None before the first.
        is_stop_requested: whether a signal has asked the run to stop.
        stop_after: number of steps of the run after which it stops as if asked to; None: no such number.
        waiting: time spent waiting for other ranks during steps.
        is_bad: 1.0 on the GPU if loss or gradient of the current step are not finite on any rank; for
            ``Engine.step``. None: they are known to be finite.
    """

    def __init__(self, failure_report: FailureReport | None = None) -> None:
        self.step: int | None = None
        self.is_stop_requested = False
        self.stop_after: int | None = None
        self.waiting = Stopwatch()
        self.is_bad: Tensor | None = None
        self._unread: _Verdict | None = None
        self._failure_report = failure_report

    def agree_to_go_on(self, loss: Tensor, gradient_norm: Tensor, step: int, *, at_once: bool = False) -> bool:
        """Agree, once per step and just before the optimiser step, whether to continue after this step.

        On a GPU the host does not wait for the answer: it reads it in the next call, while the GPU
        works on. Until then :attr:`is_bad` keeps a bad step from changing a weight. A CPU has the answer
        at once.

        Args:
            loss: of this rank's batch.
            gradient_norm: of the averaged gradient.
            step: number of the step.
            at_once: read the answer in this call, because the network is read or its masks are changed
                after this step.

        Returns:
            False if a signal has asked any rank to stop, or the run is to stop here; this step is then
            known to be good. All ranks stop after the same step, at most the second after the signal.

        Raises:
            NumericsError: on every rank, if the loss or the norm of the averaged gradient is NaN or
                infinite on any rank, in this step or the one before; :attr:`step` is then its number.
        """
        with self.waiting:
            before, self._unread = self._unread, None
            is_stopping = before is not None and self._read(before)
            self.step = step
            is_finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
            flags = _maximum(is_finite=is_finite, is_stopping=self.is_stop_requested)
            is_late = flags.is_cuda and not (at_once or is_stopping or step + 1 == self.stop_after)
            here, is_sent = flags, None
            if flags.is_cuda:
                here = flags.to("cpu", non_blocking=True)  # into memory that the GPU can write to by itself
                is_sent = torch.cuda.current_stream(flags.device).record_event()
            verdict = _Verdict(step, loss, gradient_norm, here, is_sent)
            self.is_bad, self._unread = (flags[0], verdict) if is_late else (None, None)
            is_stopping = is_stopping or (not is_late and self._read(verdict))
        return not is_stopping and step + 1 != self.stop_after

    def _read(self, verdict: _Verdict) -> bool:
        """Return whether to stop.

        Raises:
            NumericsError: the step was bad.
        """
        not_finite, is_stopping = verdict.read()
        if not_finite:
            # A NaN loss of one rank spreads to the averaged gradient of all ranks. The ranks whose
            # own loss is not finite report it; if there are none, rank 0 does.
            loss = verdict.loss.item()
            is_of_some_rank = not agree(is_finite=torch.isfinite(verdict.loss))[0]
            self.step = verdict.step
            raise NumericsError(
                f"loss {loss} or gradient norm {verdict.gradient_norm.item()} is not finite; no weight or mask was "
                "changed",
                do="lower the learning rate, or check the data of this step; resume with --resume auto",
                is_reported_elsewhere=not (not math.isfinite(loss) if is_of_some_rank else is_main()),
            )
        return is_stopping

    def agree_to_stop(self) -> bool:
        """Return whether any rank was asked to stop: a small all-reduce and a host read, outside training steps."""
        return agree(is_finite=torch.ones((), dtype=torch.bool), is_stopping=self.is_stop_requested)[1]

    def stop_on_signals(self, *, after_step: int | None = None) -> None:
        """Let SIGTERM, SIGUSR1 and SIGINT request a stop at the end of the step; the handler only sets a flag.

        A second Ctrl-C ends the process immediately. The run also stops after ``after_step`` steps.
        """
        self.stop_after = after_step

        def handler(number: int, _frame: object) -> None:
            self.is_stop_requested = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, handler)

    def leave_preempted(self, what: str) -> NoReturn:
        """End the run because it was asked to stop, with everything saved; all ranks call this together."""
        raise Preempted(f"stopped as asked: {what}", do=RESUME, is_reported_elsewhere=not is_main())

    def until_asked_to_stop(self, parts: Iterable[T], *, what: str) -> Iterator[T]:
        """Yield the parts of some work until a stop is requested; nothing is saved or agreed between parts.

        Raises:
            Preempted: this rank was asked to stop. Ranks that were not asked lose this one as a peer.
        """
        for part in parts:
            if self.is_stop_requested:
                raise Preempted(f"stopped as asked: {what}", do=RESUME)
            yield part

    @contextmanager
    def report_first(self) -> Iterator[None]:
        """Report an error in the block to the other ranks at once, before outer blocks close slowly."""
        try:
            yield
        except Exception as error:
            if self._failure_report is not None:
                self._failure_report.post(error)
            raise


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True on rank 0, which writes files and prints messages."""
    return rank() == 0


def local_rank() -> int:
    """Return the rank within this node, as set by the launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """Return the device of this rank: that of its session.

    Outside of a session it is the current GPU, if there is one and the process group, if there is one, is NCCL's.
    """
    has_cuda = torch.cuda.is_available() and (not dist.is_initialized() or "nccl" in dist.get_backend())
    is_on_gpu = _kind == devices.CUDA if _kind else has_cuda
    return torch.device("cuda", torch.cuda.current_device()) if is_on_gpu else torch.device("cpu")


def on_main(action: Callable[[], object]) -> str:
    """Call ``action`` on rank 0 and return its result as text on every rank.

    An error is raised on all ranks and reported by rank 0. Otherwise the other ranks would see a lost
    connection and end with another exit code.
    """
    outcome: dict[str, str | int] = {}
    failure: RunError | None = None
    if is_main():
        try:
            outcome = {"text": str(action())}
        except RunError as error:
            failure, outcome = error, {"code": error.code, "what": error.what, "do": error.do}
    outcome = json.loads(broadcast_text(json.dumps(outcome)))
    if failure is not None:
        raise failure
    if "code" in outcome:
        raise _error_of(int(outcome["code"]))(str(outcome["what"]), do=str(outcome["do"]), is_reported_elsewhere=True)
    return str(outcome["text"])


def broadcast_text(text: str) -> str:
    """Return the ``text`` of rank 0 on every rank."""
    if world_size() == 1:
        return text
    content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(device())
    length = torch.tensor([len(content)], device=device())
    dist.broadcast(length, 0)
    content = content if is_main() else torch.empty(int(length), dtype=torch.uint8, device=device())
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes().decode().rstrip("\0")


@contextmanager
def session(
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
    global _kind
    before, _kind = _kind, choice.kind
    if is_main():
        logger.info("device: %s", devices.summary(choices, backend))
    try:
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
    finally:
        _kind = before
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


def agree(*, is_finite: Tensor, is_stopping: bool = False) -> tuple[bool, bool]:
    """Return whether a value is finite on all ranks, and whether any rank was asked to stop.

    Costs one small all-reduce and one host read.

    Args:
        is_finite: boolean scalar on this rank's device.
        is_stopping: whether this rank was asked to stop.
    """
    not_finite, stopping = _maximum(is_finite=is_finite, is_stopping=is_stopping).tolist()
    return not not_finite, bool(stopping)


def _maximum(*, is_finite: Tensor, is_stopping: bool) -> Tensor:
    """Return whether a value is not finite on any rank, and any is to stop: float32 [2] on this rank's device."""
    stopping = torch.full((), float(is_stopping), device=is_finite.device)
    flags = torch.stack([(~is_finite).float(), stopping]).to(device())
    if world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def gather_numbers(numbers: Tensor) -> list[list[float]]:
    """Return the ``numbers``, float64 or int64 [n], of all ranks: [ranks, n]. One collective, one host read."""
    gathered: list[list[float]] = (_gather(numbers) if world_size() > 1 else numbers[None]).tolist()
    return gathered


def gather_bytes(content: bytes) -> list[bytes]:
    """Return the ``content`` of all ranks on every rank; it must have the same length on each. One collective."""
    if world_size() == 1:
        return [content]
    here = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device())
    return [row.numpy().tobytes() for row in _gather(here).cpu()]


def digest(tensor: Tensor) -> int:
    """Return a 63-bit digest of a tensor's bytes, in logical order."""
    content = tensor.detach().cpu().contiguous().view(-1)
    return int.from_bytes(hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).digest()[:8], "big") >> 1


def require_equal(what: str, digests: Mapping[str, int], *, step: int) -> None:
    """Check that digests are the same on all ranks.

    Ranks exchange one 8-byte value each; single digests are exchanged only to find one that differs.

    Args:
        what: name of what is compared, for the error.
        digests: name -> 63-bit digest.
        step: current step, for the error.

    Raises:
        IntegrityError: digests differ; names the first one and the ranks.
        PeerError: the names of the digests differ.
    """
    if world_size() == 1:
        return
    names = list(digests)
    joined = hashlib.sha256(b"".join(name.encode() + digests[name].to_bytes(8, "big") for name in names)).digest()
    here = _on_device([int.from_bytes(joined[:8], "big") >> 1])
    if len(set(_gather(here).view(-1).tolist())) == 1:
        return
    table = _gather(
        torch.tensor([digests[name] for name in names], dtype=torch.int64, device=device())
    )  # [ranks, names]
    for column, name in enumerate(names):
        values = table[:, column].tolist()
        if len(set(values)) > 1:
            odd = [r for r, value in enumerate(values) if value != values[0]]
            raise IntegrityError(
                f"{what} differ between ranks after step {step}: first in {name}, ranks {odd} against rank 0",
                do="do not resume this state; restart from the last checkpoint and check the hardware of these ranks",
                is_reported_elsewhere=not is_main(),
            )
    raise PeerError(f"ranks list different {what} at step {step}", do="start all ranks with the same configuration")


def raise_together(error: RunError | None) -> None:
    """Raise on every rank if any rank has an error: its own, or else one of the same class.

    One rank reports it. Costs one host read.
    """
    here = [error.code, world_size() - rank()] if error is not None else [0, 0]
    if world_size() > 1:
        found = _on_device(here)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        here = found.tolist()
    code, reporter = here
    if error is not None:
        error.is_reported_elsewhere = error.is_reported_elsewhere or reporter != world_size() - rank()
        raise error
    if code:
        raise _error_of(code)("another rank has failed", do="see its message", is_reported_elsewhere=True)


def _error_of(code: int) -> type[RunError]:
    return next((kind for kind in RunError.__subclasses__() if kind.code == code), RunError)


def _on_device(numbers: Sequence[int]) -> Tensor:
    """Return a few numbers as int64 [n] on this rank's device, without a copy that the host would wait for."""
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device()) for number in numbers])


def _gather(values: Tensor) -> Tensor:
    """Gather [n] of each rank into [ranks, n] on all ranks."""
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)

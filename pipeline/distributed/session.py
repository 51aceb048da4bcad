"""The state of a process group, rank helpers, and small agreements between ranks. Needs torch only.

:func:`pipeline.distributed.group.join` yields a :class:`Session`, which holds the state of the group. Every
helper also works without a process group, as rank 0 of 1, so that a user's own single-process loop needs no
set-up.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed import device as devices
from pipeline.distributed.peer_failure import FailureReport
from pipeline.errors import IntegrityError, NumericsError, PeerError, Preempted, RunError

T = TypeVar("T")

RESUME = "start again with --resume auto"
LOOK_SECONDS = 1.0  # how often a rank that waits for its GPU looks whether another rank has failed
POLL_SECONDS = 1e-4
_kind = ""  # of device that the ranks of the session have agreed on; empty outside of a session
_failures: FailureReport | None = None  # of the session


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
            _wait_for(self.is_sent)
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
            verdict = _Verdict(step, loss, gradient_norm, *_sent(flags))
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


@contextmanager
def entered(kind: str, failures: FailureReport | None = None) -> Iterator[None]:
    """Let this rank compute on that kind of device inside the block, as all others do."""
    global _kind, _failures
    before = _kind, _failures
    _kind, _failures = kind, failures
    try:
        yield
    finally:
        _kind, _failures = before


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


def agree(*, is_finite: Tensor, is_stopping: bool = False) -> tuple[bool, bool]:
    """Return whether a value is finite on all ranks, and whether any rank was asked to stop.

    Costs one small all-reduce and one host read.

    Args:
        is_finite: boolean scalar on this rank's device.
        is_stopping: whether this rank was asked to stop.
    """
    not_finite, stopping = _numbers(_maximum(is_finite=is_finite, is_stopping=is_stopping))
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
    gathered: list[list[float]] = _numbers(_gather(numbers) if world_size() > 1 else numbers[None])
    return gathered


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, which has the same bits on all of them. One collective each."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world_size())


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
    if len(set(_numbers(_gather(here).view(-1)))) == 1:
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
        here = _numbers(found)
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


def _sent(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy a tensor to the host; return it there, and the event with which it has arrived (None: it has)."""
    if not tensor.is_cuda:
        return tensor, None
    here = tensor.to("cpu", non_blocking=True)  # into memory that the GPU can write to by itself
    return here, torch.cuda.current_stream(tensor.device).record_event()


def _numbers(tensor: Tensor) -> list[Any]:
    """Return the numbers of a tensor; see :func:`_wait_for`."""
    here, is_sent = _sent(tensor)
    if is_sent is not None:
        _wait_for(is_sent)
    return here.tolist()  # type: ignore[no-any-return]


def _wait_for(event: torch.cuda.Event) -> None:
    """Wait for the GPU so that signals are handled meanwhile.

    Raises:
        PeerError: another rank reports that it has failed, so that a collective before the event may never end.
    """
    looked = time.monotonic()
    while not event.query():  # type: ignore[no-untyped-call]
        time.sleep(POLL_SECONDS)
        if _failures is not None and time.monotonic() > looked + LOOK_SECONDS:
            if _failures.is_any_reported():
                raise PeerError(
                    "another rank failed while this one waited for its GPU",
                    do="read the line of the rank that failed",
                    is_reported_elsewhere=True,
                )
            looked = time.monotonic()
    event.synchronize()


def _gather(values: Tensor) -> Tensor:
    """Gather [n] of each rank into [ranks, n] on all ranks."""
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)

"""Average gradients over ranks while backward is running: complete gradients, or only their active values.

All ranks have the same masks. A gradient that only the optimiser reads needs no values outside the
masks, so only its active values are sent: a tenth at 90% sparsity. They are gathered into one flat
buffer per bucket, summed, and written back among zeros, which masks the gradient as well. (PacTrain,
arXiv 2505.18563, does this for masks that never change.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.errors import ConfigError
from pipeline.sparse.select import count_true, positions_each

MIB = 1 << 20
MIN_BYTES = MIB  # of complete gradients per bucket; fewer are not worth a collective of their own


@dataclass
class _Bucket:
    """Parameters of one dtype whose gradients are summed by one all-reduce.

    The buffer holds the gradients one after the other, then one flag per parameter: 1 if this rank
    has a gradient for it.
    """

    parameters: list[nn.Parameter]
    waiting: set[nn.Parameter] = field(default_factory=set)  # their gradients are not ready yet
    is_missing: list[bool] = field(default_factory=list)  # for each parameter, whether this rank has no gradient
    buffer: Tensor | None = None  # flat, while the all-reduce is running
    work: dist.Work | None = None


class Reducer:
    """Average the gradients of each backward pass over ranks.

    Usage::

        reducer.use_masks(masks)     # after every topology update; without it everything is always sent
        reducer.start(dense=False)   # before the last backward pass of a step; earlier ones only accumulate
        loss.backward()
        norm = reducer.finish()

    After ``finish`` each ``grad`` is the mean over ranks, with the same bits on every rank. It is
    complete if ``dense`` was asked for or ``reduction`` is ``dense``; otherwise it is 0 outside the
    masks. (On one rank nothing is sent and gradients stay as they are.) A parameter without a
    gradient on some ranks counts as 0 there; one without a gradient on any rank has none afterwards.

    The buckets depend on the network alone, and their content on the masks alone, so that a resumed
    run sums in the same order. They are sent in order, the last parameters first, each as soon as
    its gradients are ready. They get smaller towards the end, so that little is left to send when
    backward has finished.

    When only active values are sent, ``grad`` is replaced by a tensor that the reducer keeps from
    step to step and that is 0 outside the masks. Nothing has to be zeroed, and the memory of a
    complete gradient is free as soon as it has been packed.

    Args:
        parameters: by plain name (:func:`pipeline.sparse.values.parameters_of`), equal on all ranks.
        reduction: ``packed`` or ``dense``.
        wire: ``fp32`` sends gradients in their own dtype; ``bf16`` rounds them before they are
            summed, and their partial sums again.
        bucket_mb: a bucket is full when its complete gradients take this many MiB, or half of what
            is left.
        is_listening: False when the caller reports every gradient through :meth:`note` and owns its
            memory, into which the means are written.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        reduction: str,
        wire: str,
        bucket_mb: float,
        is_listening: bool = True,
    ) -> None:
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._is_packed = reduction == "packed"
        self._wire = torch.bfloat16 if wire == "bf16" else None
        self._num_ranks = session.world_size()
        self._is_owner = is_listening
        self._active: dict[nn.Parameter, Tensor] = {}  # indices of the active weights, in memory order
        self._masked: dict[nn.Parameter, Tensor] = {}  # gradients of sparse weights when packed, 0 outside the masks
        self._buckets = [
            _Bucket(group) for group in _groups(reversed(self._parameters.values()), max_bytes=bucket_mb * MIB)
        ]
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._num_sent = 0
        self._is_whole = False
        self.is_started = False  # between start and finish
        self.is_masked = False  # after finish: gradients are 0 outside the masks
        if is_listening and self._num_ranks > 1:
            for parameter in self._parameters.values():
                parameter.register_post_accumulate_grad_hook(self.note)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks of the sparse weights.

        Args:
            masks: bool, by name, of the weights' shapes, True = active, equal on all ranks. Reads
                their numbers of active weights back to the host, all at once.

        Raises:
            ConfigError: a mask's name is not that of a parameter that requires a gradient. Such a
                weight would not be masked.
        """
        assert not self.is_started, "masks may change between steps only"
        if unknown := sorted(masks.keys() - self._parameters.keys()):
            raise ConfigError(
                f"masks: {unknown[0]} is not a parameter of the engine's network that requires a gradient",
                do="build the engine and the Sparsifier for the same network, and freeze weights before both",
            )
        self._active, self._masked = {}, {}
        counts = zip(masks.items(), count_true(list(masks.values())), strict=True)
        partly = {
            parameter: (_like(parameter, mask), num_active)
            for (name, mask), num_active in counts
            if num_active < (parameter := self._parameters[name]).numel()
        }
        marks, numbers = [mark for mark, _ in partly.values()], [number for _, number in partly.values()]
        self._active = dict(zip(partly, positions_each(marks, numbers), strict=True))

    def num_bytes(self, *, dense: bool) -> int:
        """Return how many bytes one rank contributes to the all-reduces of one step."""
        return sum(
            (sum(self._sizes(bucket, is_whole=dense or not self._is_packed)) + len(bucket.parameters))
            * (self._wire or bucket.parameters[0].dtype).itemsize
            for bucket in self._buckets
        )

    def start(self, *, dense: bool = True) -> None:
        """Announce that the gradients of the next backward pass are complete and may be sent."""
        assert not self.is_started, "the last step was not finished"
        self.is_started, self._num_sent = True, 0
        self._is_whole = dense or not self._is_packed
        for bucket in self._buckets:
            bucket.waiting = set(bucket.parameters)

    def note(self, parameter: nn.Parameter) -> None:
        """Note that the gradient of ``parameter`` is ready."""
        if not self.is_started:
            return
        waiting = self._bucket_of[parameter].waiting
        assert parameter in waiting, "a second gradient in one backward pass"
        waiting.remove(parameter)
        while self._num_sent < len(self._buckets) and not self._buckets[self._num_sent].waiting:
            self._send(self._buckets[self._num_sent])
            self._num_sent += 1

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Wait for the all-reduces and write the means into ``grad``.

        Returns:
            The norm of the gradient of all active weights and all dense parameters: a scalar with
            the same bits on all ranks, not finite when any averaged value, active or pruned, is not.
        """
        assert self.is_started, "start was not called"
        self.is_started, self.is_masked = False, self._num_ranks > 1 and not self._is_whole
        if self._num_ranks == 1:
            return self._norm(
                {p: _flat_gradient(p) for p in self._parameters.values() if p.grad is not None}, is_whole=True
            )
        for bucket in self._buckets[self._num_sent :]:  # these have parameters that took no part in the loss
            self._send(bucket)
        means = {parameter: mean for bucket in self._buckets for parameter, mean in self._receive(bucket)}
        return self._norm(means, is_whole=self._is_whole)

    def _sizes(self, bucket: _Bucket, *, is_whole: bool) -> list[int]:
        return [len(self._active[p]) if p in self._active and not is_whole else p.numel() for p in bucket.parameters]

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        first, sizes = bucket.parameters[0], self._sizes(bucket, is_whole=self._is_whole)
        bucket.is_missing = [parameter.grad is None for parameter in bucket.parameters]
        values = first.new_empty(sum(sizes) + len(sizes))
        *parts, flags = torch.split(values, [*sizes, len(sizes)])
        for parameter, part in zip(bucket.parameters, parts, strict=True):
            if parameter.grad is None:
                part.zero_()
            elif len(part) == parameter.numel():
                part.copy_(_flat_gradient(parameter))
            else:
                torch.index_select(_flat_gradient(parameter), 0, self._active[parameter], out=part)
                # if it was not cleared, backward has added to it outside the mask as well
                if parameter.grad is self._masked.get(parameter):
                    del self._masked[parameter]
                if self._is_owner:
                    parameter.grad = None  # its memory is reused by the next gradient
        flags.fill_(1)
        if any(bucket.is_missing):
            flags[bucket.is_missing] = 0
        bucket.buffer = values.to(self._wire or first.dtype)
        bucket.work = dist.all_reduce(bucket.buffer, async_op=True)

    def _receive(self, bucket: _Bucket) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Write the means into ``grad`` and yield each parameter with the averaged values that were sent."""
        assert bucket.work is not None and bucket.buffer is not None
        bucket.work.wait()
        means = bucket.buffer.to(bucket.parameters[0].dtype).div_(self._num_ranks)
        bucket.buffer = bucket.work = None
        *values, flags = torch.split(means, [*self._sizes(bucket, is_whole=self._is_whole), len(bucket.parameters)])
        for parameter, is_missing, mean, flag in zip(bucket.parameters, bucket.is_missing, values, flags, strict=True):
            if is_missing and not flag:  # reads from the device, but only where this rank has no gradient
                continue
            if len(mean) < parameter.numel():
                self._unpack(parameter, mean)
            else:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                _flat_gradient(parameter).copy_(mean)
            yield parameter, mean

    def _unpack(self, parameter: nn.Parameter, mean: Tensor) -> None:
        if parameter.grad is not None and not self._is_owner:
            _flat_gradient(parameter).zero_()
        else:
            if parameter not in self._masked:
                self._masked[parameter] = torch.zeros_like(parameter)
            parameter.grad = self._masked[parameter]
        _flat_gradient(parameter).index_copy_(0, self._active[parameter], mean)

    def _norm(self, values: Mapping[nn.Parameter, Tensor], *, is_whole: bool) -> Tensor:
        assert values, "no gradient on any rank: call backward first"
        norm = _norm_of(values.values())
        if not is_whole or not self._active:
            return norm
        active = _norm_of(
            value.index_select(0, self._active[p]) if p in self._active else value for p, value in values.items()
        )
        return active + 0.0 * norm  # 0 · inf is NaN


def _groups(parameters: Iterable[nn.Parameter], *, max_bytes: float) -> list[list[nn.Parameter]]:
    """Cut ``parameters``, in order, into groups.

    A group ends when it has ``max_bytes`` or half of what was left, or when the dtype changes.
    """
    groups: list[list[nn.Parameter]] = []
    parameters = list(parameters)
    left = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
    limit = num_bytes = 0.0
    for parameter in parameters:
        if not groups or num_bytes >= limit or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            num_bytes, limit = 0, min(max_bytes, max(left / 2, MIN_BYTES))
        groups[-1].append(parameter)
        num_bytes += parameter.numel() * parameter.itemsize
        left -= parameter.numel() * parameter.itemsize
    return groups


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    """View the gradient in the memory order of its parameter, [n]; copies it first if its own order differs."""
    assert parameter.grad is not None
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return _in_memory_order(parameter.grad)


def _like(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """Return the mask in the memory order of its parameter, [n]."""
    is_alike = mask.stride() == parameter.stride()
    return _in_memory_order(mask if is_alike else torch.empty_like(parameter, dtype=torch.bool).copy_(mask))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """View the elements of a tensor without gaps (channels-last or contiguous) in memory order, [n]."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _norm_of(tensors: Iterable[Tensor]) -> Tensor:
    norms: list[Tensor] = torch._foreach_norm(list(tensors))  # type: ignore[assignment]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm

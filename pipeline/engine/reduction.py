"""Average gradients over ranks while backward is running: complete gradients, or only their active values.

All ranks have the same masks. A gradient that only the optimiser reads needs no values outside the
masks, so only its active values are sent: a tenth at 90% sparsity. They are gathered into one flat
buffer per bucket, summed, and written back among zeros, which masks the gradient as well. (PacTrain,
arXiv 2505.18563, does this for masks that never change.)

On a GPU one index packs and unpacks a bucket, because every operation has to be launched. On a CPU each
parameter has its own, because it is the copy of complete gradients into one buffer that would take time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.errors import ConfigError
from pipeline.sparse.select import count_true, is_on_host, positions_each

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
    is_sparse: bool = False  # some weights of the parameters are inactive
    index: Tensor | None = None  # on a GPU, where it is sparse: which of the complete gradients and flags are sent
    masked: Tensor | None = None  # the gradients when packed, flat, and 0 outside the masks
    views: list[Tensor] = field(default_factory=list)  # of ``masked``, one for each parameter

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Numbers of values of the complete gradients."""
        return [parameter.numel() for parameter in self.parameters]

    @functools.cached_property
    def ones(self) -> Tensor:
        """The flags of a rank that has all gradients."""
        return self.parameters[0].new_ones(len(self.parameters))

    def marks(self, marks: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return which of the complete gradients and flags are sent, flat: what ``marks``, [n] each, say, or all."""
        yes = self.parameters[0].new_ones((), dtype=torch.bool)
        whole = [marks.get(parameter, yes.expand(parameter.numel())) for parameter in self.parameters]
        return torch.cat([*whole, yes.expand(len(whole))])

    def flags(self) -> Tensor:
        """Return 1 for each parameter that has a gradient on this rank, else 0."""
        flags = self.ones.clone() if any(self.is_missing) else self.ones
        for index in itertools.compress(itertools.count(), self.is_missing):
            flags[index].zero_()
        return flags

    def complete(self) -> list[Tensor]:
        """Return the complete gradients, flat; 0 where there is none."""
        return [
            _flat_gradient(parameter) if parameter.grad is not None else parameter.new_zeros(parameter.numel())
            for parameter in self.parameters
        ]


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
        self._num_active: dict[nn.Parameter, int] = {}  # of weights of which some are inactive
        self._active: dict[nn.Parameter, Tensor] = {}  # on a CPU: indices of the active weights, in memory order
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
        self._num_active, self._active = {}, {}
        marks: dict[nn.Parameter, Tensor] = {}
        for (name, mask), num_active in zip(masks.items(), count_true(list(masks.values())), strict=True):
            if num_active < (parameter := self._parameters[name]).numel():
                marks[parameter], self._num_active[parameter] = _like(parameter, mask), num_active
        for bucket in self._buckets:
            bucket.index = bucket.masked = None
            bucket.is_sparse = any(parameter in marks for parameter in bucket.parameters)
        if any(is_on_host(mark) for mark in marks.values()):
            indices = positions_each(list(marks.values()), list(self._num_active.values()))
            self._active = dict(zip(marks, indices, strict=True))
            return
        sparse = [bucket for bucket in self._buckets if bucket.is_sparse]
        sizes = [self._sizes(bucket, is_whole=False) for bucket in sparse]
        indices = positions_each([bucket.marks(marks) for bucket in sparse], [sum(each) for each in sizes])
        for bucket, index in zip(sparse, indices, strict=True):
            bucket.index = index

    def num_bytes(self, *, dense: bool) -> int:
        """Return how many bytes one rank contributes to the all-reduces of one step."""
        return sum(
            sum(self._sizes(bucket, is_whole=dense or not self._is_packed))
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
            values = {p: _flat_gradient(p) for p in self._parameters.values() if p.grad is not None}
            return self._norm(values, (torch.cat([*bucket.complete(), bucket.ones]) for bucket in self._buckets))
        for bucket in self._buckets[self._num_sent :]:  # these have parameters that took no part in the loss
            self._send(bucket)
        means = [self._mean(bucket) for bucket in self._buckets]
        values = {
            parameter: mean
            for bucket, whole in zip(self._buckets, means, strict=True)
            for parameter, mean in self._unpack(bucket, whole)
        }
        return self._norm(values, means if self._is_whole else None)

    def _sizes(self, bucket: _Bucket, *, is_whole: bool) -> list[int]:
        """Return how many values are sent of each parameter of the bucket, and the number of flags."""
        sizes = bucket.sizes if is_whole else [self._num_active.get(p, p.numel()) for p in bucket.parameters]
        return [*sizes, len(bucket.parameters)]

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        bucket.is_missing = [parameter.grad is None for parameter in bucket.parameters]
        values = self._packed(bucket)
        if any(p.grad is view for p, view in zip(bucket.parameters, bucket.views, strict=False)):
            bucket.masked = None  # it was not cleared, and backward has added to it outside the masks as well
        if self._is_owner:
            for parameter in bucket.parameters:
                parameter.grad = None  # its memory is reused by the next gradient
        self._start_sum(bucket, values)

    # Another kind of sum, such as one of whole numbers, replaces the next two.

    def _start_sum(self, bucket: _Bucket, values: Tensor) -> None:
        """Start to sum values and flags over all ranks."""
        bucket.buffer = values.to(self._wire or values.dtype)
        bucket.work = dist.all_reduce(bucket.buffer, async_op=True)

    def _mean(self, bucket: _Bucket) -> Tensor:
        """Wait for the sum; return the means of values and flags, in the dtype of the parameters."""
        assert bucket.work is not None and bucket.buffer is not None
        bucket.work.wait()
        means = bucket.buffer.to(bucket.parameters[0].dtype).div_(self._num_ranks)
        bucket.buffer = bucket.work = None
        return means

    def _packed(self, bucket: _Bucket) -> Tensor:
        """Return the values to send and the flags, in memory of their own: [n]."""
        gradients, flags = bucket.complete(), bucket.flags()
        if self._is_whole or not bucket.is_sparse:
            return torch.cat([*gradients, flags])
        if bucket.index is not None:
            return torch.cat([*gradients, flags]).index_select(0, bucket.index)
        sizes = self._sizes(bucket, is_whole=False)
        values = flags.new_empty(sum(sizes))
        *parts, last = torch.split(values, sizes)
        for parameter, gradient, part in zip(bucket.parameters, gradients, parts, strict=True):
            if parameter in self._active:
                torch.index_select(gradient, 0, self._active[parameter], out=part)
            else:
                part.copy_(gradient)
        last.copy_(flags)
        return values

    def _unpack(self, bucket: _Bucket, means: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Write the means into ``grad``; return the parameters that have one, each with the values that were sent."""
        *values, flags = torch.split(means, self._sizes(bucket, is_whole=self._is_whole))
        whole = means if self._is_whole else self._spread(bucket, means, values)
        places = torch.split(whole, [*bucket.sizes, len(bucket.sizes)])
        views = [place.as_strided(p.size(), p.stride()) for p, place in zip(bucket.parameters, places, strict=False)]
        if not self._is_whole:
            bucket.views = views
        received, targets, sources = [], [], []
        for number, (parameter, view, value) in enumerate(zip(bucket.parameters, views, values, strict=True)):
            if bucket.is_missing[number] and not flags[number]:  # reads from the device only where this rank has none
                continue
            if self._is_owner or parameter.grad is None:
                parameter.grad = view
            else:
                targets.append(_flat_gradient(parameter))
                sources.append(places[number])
            received.append((parameter, value))
        if targets:
            torch._foreach_copy_(targets, sources)
        return received

    def _spread(self, bucket: _Bucket, means: Tensor, values: list[Tensor]) -> Tensor:
        """Return the complete gradients, flat, with the active values in their places and 0 elsewhere."""
        if not bucket.is_sparse:
            return means
        if bucket.masked is None:
            bucket.masked = means.new_zeros(sum(bucket.sizes) + len(bucket.sizes))
        if bucket.index is not None:
            return bucket.masked.index_copy_(0, bucket.index, means)
        for parameter, place, value in zip(
            bucket.parameters, torch.split(bucket.masked[: sum(bucket.sizes)], bucket.sizes), values, strict=True
        ):
            if parameter in self._active:
                place.index_copy_(0, self._active[parameter], value)
            else:
                place.copy_(value)
        return bucket.masked

    def _norm(self, values: Mapping[nn.Parameter, Tensor], wholes: Iterable[Tensor] | None) -> Tensor:
        """Return the norm of the active values.

        Args:
            values: of every parameter that has a gradient.
            wholes: for each bucket its complete gradients and flags, flat; None: ``values`` are the active ones.
        """
        assert values, "no gradient on any rank: call backward first"
        norm = _norm_of(values.values())
        if wholes is None or not self._num_active:
            return norm
        if self._active:
            active = [v.index_select(0, self._active[p]) if p in self._active else v for p, v in values.items()]
        else:
            active = []
            for bucket, whole in zip(self._buckets, wholes, strict=True):
                sent = whole if bucket.index is None else whole.index_select(0, bucket.index)
                active += torch.split(sent, self._sizes(bucket, is_whole=False))[:-1]
        return _norm_of(active) + 0.0 * norm  # 0 · inf is NaN


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

"""The engines that run on DeepSpeed (0.19); the only module here that imports it.

Gradients are averaged by our :class:`Reducer` instead of DeepSpeed's own reduction, which sends
complete gradients, is measurably slower and, in stage 1 with autocast, rounds them to bfloat16 for
the transfer.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed import session
from pipeline.engine.deepspeed_import import importing_deepspeed
from pipeline.engine.torch_engine import (
    TorchEngine,
    build_optimizer,
    place_model,
    take_pixels_before_convolving,
)
from pipeline.errors import ConfigError, ServiceError
from pipeline.sparse.values import parameters_of

STEP = "step"  # Adam's step count: the only entry of an optimiser state that does not have the parameter's shape


def _is_news(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()  # ours is tested in tests/engine


class DeepSpeedEngine(TorchEngine):
    """ZeRO stage 0: every rank holds all weights and all optimiser state."""

    def _wrap(self) -> None:
        is_on_cpu = session.device().type == "cpu"
        if is_on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # so that DeepSpeed does not probe for accelerators
        with importing_deepspeed():
            import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(_is_news)
        if is_on_cpu:
            # Otherwise DeepSpeed compiles a shared-memory op for inference at start, which takes a
            # minute, needs a compiler and is not used in training.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": self._micro_batch,
            "gradient_accumulation_steps": self.config.accumulation,
            # DeepSpeed's default of 1.0 would silently change training; we clip after masking
            "gradient_clipping": 0.0,
            "torch_autocast": {"enabled": self.config.precision == "bf16", "dtype": "bfloat16"},
            # DeepSpeed's default makes the host wait for the GPU in every micro-batch and every step
            "timers": {"throughput": {"enabled": False}},
            **self._zero_settings(),
            **self.config.deepspeed,
        }
        optimizer = build_optimizer(self.model, self.config)
        groups = [list(group["params"]) for group in optimizer.param_groups]  # copied: stage 1 changes them
        # DeepSpeed would take LOCAL_RANK for the number of the GPU, and refuse a launcher inside a task of mpirun
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        place = argparse.Namespace(device_rank=session.device().index or 0)
        self._engine, _, _, _ = deepspeed.initialize(place, model=self._network, optimizer=optimizer, config=settings)
        self._engine.enable_backward_allreduce = False
        # From now on its step() is the optimiser's step and everything before it accumulates, so
        # that DeepSpeed need not count micro-batches.
        self._engine.set_gradient_accumulation_boundary(True)
        if not self.config.compile:
            self.model = self._engine.module
        self.optimizer = self._engine.basic_optimizer
        self._lay_out(groups)

    def _zero_settings(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": 0}}

    def _lay_out(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        place_model(self.model, self.config)  # after DeepSpeed's broadcast of weights, which needs contiguous tensors

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._engine(inputs)  # under DeepSpeed's autocast
        return logits

    def _add_gradient(self, loss: Tensor) -> None:
        self._engine.backward(loss)  # divides by the number of micro-batches

    def _optimizer_step(self) -> None:
        self._engine.step()


@dataclass(frozen=True)
class _Place:
    """The part of a parameter that this rank's partition holds, and its place there.

    It is ``parameter.flatten()[start : start + size]``.
    """

    group: int
    partition: Tensor  # flat
    offset: int  # in the partition
    start: int  # in the parameter
    size: int  # 0: the partition has no part of this parameter

    def of(self, flat: Tensor) -> Tensor:
        """View this parameter's part of the partition, or of optimiser state or a gradient of the partition's shape."""
        return flat.detach().narrow(0, self.offset, self.size)

    def cut(self, whole: Tensor) -> Tensor:
        """Take the same part of a tensor of the parameter's shape."""
        return whole.detach().flatten().narrow(0, self.start, self.size)


class ShardedDeepSpeedEngine(DeepSpeedEngine):
    """ZeRO stage 1: each rank keeps the optimiser state, and a second copy of the weights, of one part of the network.

    DeepSpeed steps on *partitions*. It concatenates the parameters of each group into a flat tensor
    and cuts that into one piece per rank. The pieces are cloned from the model's weights at start
    and copied back over them after every step. Masking only the model's weights would therefore be
    undone by the next step; :meth:`fragments` returns what else must be masked. Gradients belong to
    the model, as in stage 0, and are cut up only for the step itself.

    After every step, DeepSpeed makes the model's weights views of a flat, contiguous buffer. With
    ``channels_last`` they are copies instead, in that memory format, renewed after each step.

    After a step every rank needs the partitions of the others. With ``reduction: packed`` only
    their active weights are sent, where DeepSpeed sends all; the pruned ones are 0 everywhere.
    """

    def _zero_settings(self) -> dict[str, Any]:
        # Without contiguous_gradients and overlap_comm, DeepSpeed sets no gradient hooks and leaves
        # ``grad`` alone between backward and step. Its norm would cost a collective and is not used.
        zero = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False, "compute_grad_norm": False}
        return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}

    def _lay_out(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._places: dict[nn.Parameter, _Place] = {}
        # for each rank, its partitions and the indices of their active weights; empty without masks
        self._active: list[list[tuple[Tensor, Tensor]]] = []
        zero = self._engine.optimizer
        try:
            self._averaged_gradients: dict[int, Any] = zero.averaged_gradients
            if hooks := zero._grad_acc_hooks:
                raise self._unknown_layout(f"{len(hooks)} hooks take gradients away")
            # for each group, the partitions of all ranks: [ranks · size]
            self._flat: list[Tensor] = list(zero.bit16_groups_flat)
            self._offsets = [
                dict(zip(*pair, strict=True))
                for pair in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
            ]
            for group, parameters in enumerate(groups):
                (partition,) = self.optimizer.param_groups[group]["params"]
                for parameter in parameters:
                    self._places[parameter] = _place_of(parameter, group, partition)
        except (AttributeError, ValueError) as error:
            raise self._unknown_layout(str(error)) from error
        # their padding stays 0
        self._gradients = {place.group: torch.zeros_like(place.partition) for place in self._places.values()}
        num_equal = sum(
            place.size for p, place in self._places.items() if torch.equal(place.of(place.partition), place.cut(p))
        )
        for flat, offsets in zip(self._flat, self._offsets, strict=True):
            for parameter, offset in offsets.items():
                if not torch.equal(flat.narrow(0, offset, parameter.numel()), parameter.flatten()):
                    raise self._unknown_layout("a weight is not at its expected place in the flat buffer")
        total = torch.tensor(num_equal, device=session.device())
        if session.world_size() > 1:
            dist.all_reduce(total)
        if int(total) != sum(parameter.numel() for parameter in self._places):
            expected = sum(parameter.numel() for parameter in self._places)
            raise self._unknown_layout(f"only {int(total)} of {expected} weights are at their expected place")
        if self.config.channels_last:
            take_pixels_before_convolving(self.model)
        self._use_memory_format()

    def _use_memory_format(self) -> None:
        if self.config.channels_last:
            for parameter in self._places:
                if parameter.dim() == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def _unknown_layout(self, why: str) -> ServiceError:
        import deepspeed

        return ServiceError(
            f"train.zero_stage: DeepSpeed {deepspeed.__version__} has an unsupported memory layout in stage 1: {why}",
            do="install the DeepSpeed version that pyproject.toml names, or set train.zero_stage=0",
        )

    def _optimizer_step(self) -> None:
        if unused := [name for name, parameter in self.model.named_parameters() if parameter.grad is None]:
            raise ConfigError(
                f"train.zero_stage: {', '.join(unused[:3])} took no part in the loss; "
                "stage 1 would apply weight decay to them, stage 0 does not",
                do="set train.zero_stage=0",
            )
        for parameter, place in self._places.items():
            if place.size:
                assert parameter.grad is not None
                place.of(self._gradients[place.group]).copy_(place.cut(parameter.grad))
        self._averaged_gradients.update({group: [gradient] for group, gradient in self._gradients.items()})
        with self._own_exchange() if self._active else nullcontext():
            super()._optimizer_step()
        self._use_memory_format()

    @torch.no_grad()
    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        super().use_masks(masks)
        if self.config.reduction == "dense" or session.world_size() == 1:
            return
        mask_of = {parameter: masks[name] for name, parameter in parameters_of(self.model).items() if name in masks}
        self._active = [[] for _ in range(session.world_size())]
        for flat, offsets in zip(self._flat, self._offsets, strict=True):
            is_active = torch.zeros_like(flat, dtype=torch.bool)
            for parameter, offset in offsets.items():
                part = is_active.narrow(0, offset, parameter.numel())
                part.copy_(mask_of[parameter].flatten() if parameter in mask_of else torch.ones_like(part))
            # with channels_last the model's weights, which are masked already, are copies of this
            flat.masked_fill_(~is_active, 0.0)
            for places, partition, part in zip(
                self._active, *(t.view(len(self._active), -1) for t in (flat, is_active)), strict=True
            ):
                places.append((partition, part.nonzero().squeeze(1)))

    @contextmanager
    def _own_exchange(self) -> Iterator[None]:
        """Let :meth:`_exchange` exchange the partitions inside the block, in place of DeepSpeed."""
        from deepspeed.runtime.zero import stage_1_and_2

        original = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = self._exchange
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = original

    def _exchange(self, **_: Any) -> None:
        """Send the active weights of every partition to every rank, in one collective."""
        rank = session.rank()
        values = torch.cat([partition.index_select(0, active) for partition, active in self._active[rank]])
        here = values.new_zeros(max(sum(len(active) for _, active in places) for places in self._active))
        here[: len(values)] = values
        everywhere = list(here.new_empty(session.world_size(), len(here)))
        dist.all_gather(everywhere, here)
        for other, values in enumerate(everywhere):
            for partition, active in self._active[other] if other != rank else ():
                partition.index_copy_(0, active, values[: len(active)])
                values = values[len(active) :]

    def fragments(self, parameter: nn.Parameter) -> Sequence[tuple[Tensor, int]]:
        """See :class:`Engine`: fragments of the weights themselves, and of each moment."""
        place = self._places[parameter]
        if not place.size:
            return []
        moments = [value for key, value in self.optimizer.state.get(place.partition, {}).items() if key != STEP]
        return [(place.of(flat), place.start) for flat in (place.partition, *moments) if isinstance(flat, Tensor)]

    @torch.no_grad()
    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See :class:`Engine`; one all-reduce for each moment."""
        place, found = self._places[parameter], {}
        # sorted, because after a restart the order differs between ranks
        for key, flat in sorted(self.optimizer.state.get(place.partition, {}).items()):
            if key == STEP:
                found[key] = flat.clone()
            elif isinstance(flat, Tensor):
                whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=flat.device)
                place.cut(whole).copy_(place.of(flat))
                if session.world_size() > 1:
                    dist.all_reduce(whole.view(torch.int32))  # as integers, which keeps even the sign of zero
                found[key] = whole.view(parameter.shape)
        return found

    @torch.no_grad()
    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        place = self._places[parameter]
        parameter.copy_(weight)
        place.of(place.partition).copy_(place.cut(weight))
        here = self.optimizer.state[place.partition]
        for key, value in state.items():
            if key == STEP:
                here[key] = value.to(parameter.device, copy=True)
            else:
                here.setdefault(key, torch.zeros_like(place.partition, dtype=value.dtype))
                place.of(here[key]).copy_(place.cut(value))


def _place_of(parameter: nn.Parameter, group: int, partition: Tensor) -> _Place:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return _Place(group, partition, 0, 0, 0)
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Place(group, partition, here.start, there.start, here.numel)

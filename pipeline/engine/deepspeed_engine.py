"""The engines that run on DeepSpeed (0.19). The only place that imports it.

Gradients are averaged by our :class:`Reducer` in place of DeepSpeed's own reduction, which sends
them whole, is measurably slower and, in stage 1 with autocast, rounds them to bfloat16 on the wire.
"""

from __future__ import annotations

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
from pipeline.engine.torch_engine import TorchEngine, build_optimizer, place_model
from pipeline.errors import ConfigError, ServiceError

STEP = "step"  # Adam's count of steps: the one entry of an optimiser's state that is not of the parameter's shape


def _is_news(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()  # tests/engine/test_engines.py tests ours


class DeepSpeedEngine(TorchEngine):
    """ZeRO stage 0: every rank holds everything."""

    def _wrap(self) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no probing for accelerators
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(_is_news)
        if not torch.cuda.is_available():
            # Compiles a shared-memory op for inference at start (a minute, and needs a compiler);
            # training has no use for it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": self._micro_batch,
            "gradient_accumulation_steps": self.config.accumulation,
            # its default is 1.0, which silently trains another network; ours clips after masking
            "gradient_clipping": 0.0,
            "torch_autocast": {"enabled": self.config.precision == "bf16", "dtype": "bfloat16"},
            **self._zero_settings(),
            **self.config.deepspeed,
        }
        optimizer = build_optimizer(self.model, self.config)
        groups = [list(group["params"]) for group in optimizer.param_groups]  # stage 1 changes them
        self._engine, _, _, _ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings)
        self._engine.enable_backward_allreduce = False
        # From now on its step() is the optimiser's step, and what comes before it accumulates:
        # nothing to count, nothing to lose count of.
        self._engine.set_gradient_accumulation_boundary(True)
        self.model = self._engine.module
        self.optimizer = self._engine.basic_optimizer
        self._lay_out(groups)

    def _zero_settings(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": 0}}

    def _lay_out(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        place_model(self.model, self.config)  # only now: DeepSpeed's broadcast of the weights takes contiguous tensors

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._engine(inputs)  # under DeepSpeed's autocast
        return logits

    def _add_gradient(self, loss: Tensor) -> None:
        self._engine.backward(loss)  # divides by the number of micro-batches

    def _optimizer_step(self) -> None:
        self._engine.step()


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in this rank's partition of its group, and which part of it: ``parameter.flatten()[start : start + size]``."""

    group: int
    partition: Tensor  # flat
    offset: int  # in the partition
    start: int  # in the parameter
    size: int  # 0: no part of this parameter is here

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of the partition, or of optimiser state or a gradient of the partition's shape."""
        return flat.detach().narrow(0, self.offset, self.size)

    def cut(self, whole: Tensor) -> Tensor:
        """The same part of a tensor of the parameter's shape."""
        return whole.detach().flatten().narrow(0, self.start, self.size)


class ShardedDeepSpeedEngine(DeepSpeedEngine):
    """ZeRO stage 1: each rank keeps the optimiser state, and a second copy of the weights, of one part of the network.

    DeepSpeed steps on *partitions*: for every parameter group the flat concatenation of its
    parameters, cut into one piece per rank, cloned from the model's weights at start and copied
    over them after every step. So masking the model's weights alone is undone by the next:
    :meth:`fragments` says what else must be masked. Gradients are the model's, as in stage 0, and
    are cut up only for the step itself.

    After every step DeepSpeed makes the model's weights views of a flat, contiguous buffer. With
    ``channels_last`` they are copies of that instead, laid out anew after each step.

    After a step every rank needs the others' partitions. With ``reduction: packed`` their active
    weights travel, in place of DeepSpeed's whole ones: the others are 0 everywhere.
    """

    def _zero_settings(self) -> dict[str, Any]:
        # Without contiguous_gradients and overlap_comm there are no gradient hooks: ``grad`` is
        # ours between backward and step. The norm would cost a collective and is not used.
        zero = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False, "compute_grad_norm": False}
        return {"zero_optimization": zero, "zero_allow_untested_optimizer": True}

    def _lay_out(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._places: dict[nn.Parameter, _Place] = {}
        self._active: list[
            list[tuple[Tensor, Tensor]]
        ] = []  # of each rank: its partitions and where they are active; none without masks
        zero = self._engine.optimizer
        try:
            self._averaged_gradients: dict[int, Any] = zero.averaged_gradients
            if hooks := zero._grad_acc_hooks:
                raise self._unknown_layout(f"{len(hooks)} hooks take gradients away")
            self._flat: list[Tensor] = list(
                zero.bit16_groups_flat
            )  # of each group: the partitions of all ranks, [ranks · size]
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
        self._gradients = {
            place.group: torch.zeros_like(place.partition) for place in self._places.values()
        }  # what pads them stays 0
        num_equal = sum(
            place.size for p, place in self._places.items() if torch.equal(place.of(place.partition), place.cut(p))
        )
        for flat, offsets in zip(self._flat, self._offsets, strict=True):
            for parameter, offset in offsets.items():
                if not torch.equal(flat.narrow(0, offset, parameter.numel()), parameter.flatten()):
                    raise self._unknown_layout("a weight is not where it should be among all")
        total = torch.tensor(num_equal, device=session.device())
        if session.world_size() > 1:
            dist.all_reduce(total)
        if int(total) != sum(parameter.numel() for parameter in self._places):
            raise self._unknown_layout(f"{int(total)} weights are where they should be")
        self._use_memory_format()

    def _use_memory_format(self) -> None:
        if self.config.channels_last:
            for parameter in self._places:
                if parameter.dim() == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def _unknown_layout(self, why: str) -> ServiceError:
        import deepspeed

        return ServiceError(
            f"train.zero_stage: DeepSpeed {deepspeed.__version__} lays stage 1 out in a way that is not known here: {why}",
            do="install the DeepSpeed that pyproject.toml names, or set train.zero_stage=0",
        )

    def _optimizer_step(self) -> None:
        if unused := [name for name, parameter in self.model.named_parameters() if parameter.grad is None]:
            raise ConfigError(
                f"train.zero_stage: {', '.join(unused[:3])} took no part in the loss; stage 1 would decay what stage 0 leaves alone",
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
        mask_of = {parameter: masks[name] for name, parameter in self.model.named_parameters() if name in masks}
        self._active = [[] for _ in range(session.world_size())]
        for flat, offsets in zip(self._flat, self._offsets, strict=True):
            is_active = torch.zeros_like(flat, dtype=torch.bool)
            for parameter, offset in offsets.items():
                part = is_active.narrow(0, offset, parameter.numel())
                part.copy_(mask_of[parameter].flatten() if parameter in mask_of else torch.ones_like(part))
            flat.masked_fill_(~is_active, 0.0)  # with channels_last the model's weights, which were masked, are copies
            for places, partition, part in zip(
                self._active, *(t.view(len(self._active), -1) for t in (flat, is_active)), strict=True
            ):
                places.append((partition, part.nonzero().squeeze(1)))

    @contextmanager
    def _own_exchange(self) -> Iterator[None]:
        """Meanwhile the partitions are exchanged by :meth:`_exchange`."""
        from deepspeed.runtime.zero import stage_1_and_2

        theirs = stage_1_and_2.all_gather_dp_groups
        stage_1_and_2.all_gather_dp_groups = self._exchange
        try:
            yield
        finally:
            stage_1_and_2.all_gather_dp_groups = theirs

    def _exchange(self, **_: Any) -> None:
        """The active weights of every partition to every rank, in one collective."""
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
        """See :class:`Engine`: of the weights themselves, and of each moment."""
        place = self._places[parameter]
        if not place.size:
            return []
        moments = [value for key, value in self.optimizer.state.get(place.partition, {}).items() if key != STEP]
        return [(place.of(flat), place.start) for flat in (place.partition, *moments) if isinstance(flat, Tensor)]

    @torch.no_grad()
    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See :class:`Engine`; one all-reduce for each moment."""
        place, found = self._places[parameter], {}
        for key, flat in sorted(
            self.optimizer.state.get(place.partition, {}).items()
        ):  # after a restart each rank has an order of its own
            if key == STEP:
                found[key] = flat.clone()
            elif isinstance(flat, Tensor):
                whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=flat.device)
                place.cut(whole).copy_(place.of(flat))
                if session.world_size() > 1:
                    dist.all_reduce(whole.view(torch.int32))  # as whole numbers: exact, the sign of zero included
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

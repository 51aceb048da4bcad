"""The engine: backward, averaged gradients, optimiser step, optimiser state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from pipeline.config.schema import TrainConfig
from pipeline.distributed import session
from pipeline.distributed.session import Stopwatch
from pipeline.engine.reduction import Reducer
from pipeline.engine.sgd import OnePassSGD
from pipeline.errors import ConfigError


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW. Weight decay spares what has one dimension (biases, normalisation), unless the configuration says otherwise."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or config.weight_decay_on_norm]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not config.weight_decay_on_norm]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    is_on_gpu = session.device().type == "cuda"
    if config.optimizer == "adamw":
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), eps=config.eps, fused=is_on_gpu)
    if is_on_gpu:
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return OnePassSGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """The precision of forward passes, None for fp32.

    Parameters stay fp32, so there are no hidden master weights to mask.
    """
    return torch.bfloat16 if config.precision == "bf16" else None


def micro_batches_per_rank(config: TrainConfig) -> int:
    """Samples of one micro-batch on one rank.

    Raises:
        ConfigError: when the global batch cannot be divided evenly.
    """
    shares = session.world_size() * config.accumulation
    if config.global_batch % shares:
        raise ConfigError(
            f"train.global_batch: {config.global_batch} samples cannot be divided over {session.world_size()} ranks × "
            f"{config.accumulation} micro-batches",
            do=f"choose a multiple of {shares}",
        )
    return config.global_batch // shares


class TorchEngine:
    """Plain torch: autocast, accumulation, and a :class:`Reducer` for the last micro-batch of a step."""

    optimizer: torch.optim.Optimizer
    _tells_of_gradients = (
        False  # True: the engine tells the reducer of every gradient, which needs no hooks of its own then
    )

    def __init__(self, model: nn.Module, config: TrainConfig, waiting: Stopwatch) -> None:
        self.model = model
        self.config = config
        self._waiting = waiting  # for other ranks
        self._micro_batch = micro_batches_per_rank(config)
        self._wrap()
        self._reducer = Reducer(
            dict(self.model.named_parameters()),
            reduction=config.reduction,
            wire=config.wire,
            bucket_mb=config.bucket_mb,
            is_listening=not self._tells_of_gradients,
        )

    def _wrap(self) -> None:
        """Take the model over: make the optimiser, and lay the weights out."""
        self.model = place_model(self.model, self.config)
        self.optimizer = build_optimizer(self.model, self.config)

    def backward(self, images: Tensor, labels: Tensor, *, lr: float, dense: bool = True) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        for inputs, targets in zip(
            torch.split(images, self._micro_batch), torch.split(labels, self._micro_batch), strict=True
        ):
            if len(losses) == self.config.accumulation - 1:
                self._reducer.start(dense=dense)
            loss = cross_entropy(self._logits(inputs).float(), targets, label_smoothing=self.config.label_smoothing)
            self._add_gradient(loss)
            losses.append(loss.detach())
        with self._waiting:
            gradient_norm = self._reducer.finish()
        return torch.stack(losses).mean(), gradient_norm

    @property
    def is_gradient_masked(self) -> bool:
        """See :class:`Engine`."""
        return self._reducer.is_masked

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        self._reducer.use_masks(masks)

    def _logits(self, inputs: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(inputs)
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(session.device().type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _add_gradient(self, loss: Tensor) -> None:
        (loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """See :class:`Engine`."""
        if self.config.clip_norm is not None:  # by now masked: the norm is the sparse network's
            clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._optimizer_step()
        self._clear_gradients()

    def _optimizer_step(self) -> None:
        self.optimizer.step()

    def skip_step(self) -> None:
        """See :class:`Engine`."""
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def fragments(self, parameter: nn.Parameter) -> Sequence[tuple[Tensor, int]]:
        """See :class:`Engine`; here there are none."""
        return []

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return {
            key: value.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    @torch.no_grad()
    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        parameter.copy_(weight)
        for key, value in state.items():
            like = parameter if value.shape == parameter.shape else value  # in the parameter's memory format
            self.optimizer.state[parameter][key] = torch.empty_like(
                like, dtype=value.dtype, device=parameter.device
            ).copy_(value)


class DistributedDataParallelEngine(TorchEngine):
    """Torch's DistributedDataParallel, whose communication hook hands its gradients to the :class:`Reducer`.

    It decides when gradients are ready, by buckets of its own, and holds them; averaging, and so
    every bit, is as in ``TorchEngine``.
    """

    _tells_of_gradients = True

    def _wrap(self) -> None:
        super()._wrap()
        self._parallel: DistributedDataParallel | None = None
        if session.world_size() > 1:
            self._parallel = DistributedDataParallel(
                self.model,
                forward_sync_buffers=False,  # each rank keeps its own BatchNorm statistics
                bucket_cap_mb=1,  # how soon the hook is told; what travels together is the reducer's business
                find_unused_parameters=True,
                gradient_as_bucket_view=True,  # one copy less
            )
            # A lambda, because DDP compares a function's annotations with types, and here they are strings.
            self._parallel.register_comm_hook(None, lambda state, bucket: self._hand_over(bucket))

    def _hand_over(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """A ``torch.distributed.GradBucket`` is complete."""
        for parameter in bucket.parameters():
            self._reducer.note(parameter)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(
            bucket.buffer()
        )  # as it is: ``finish`` writes the means into the gradients, which are views of it
        return done

    def _logits(self, inputs: Tensor) -> Tensor:
        if self._parallel is None:
            return super()._logits(inputs)
        with self._autocast(), nullcontext() if self._reducer.is_started else self._parallel.no_sync():
            logits: Tensor = self._parallel(inputs)
        return logits


def place_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """``model`` on this rank's device, in the configured memory format."""
    model = model.to(session.device())
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload, no-any-return]

"""The engine: backward, averaged gradients, optimiser step, optimiser state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from pipeline.distributed import session
from pipeline.distributed.reduction import average_gradients
from pipeline.errors import ConfigError
from pipeline.schema import TrainConfig


class Engine(Protocol):
    """What training needs of a training system."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, images: Tensor, labels: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Loss of this rank's batch and norm of the averaged gradient, detached scalars.

        Afterwards every ``grad`` is dense, not clipped, averaged over ranks and micro-batches, and has the same bits on all ranks.
        """

    def step(self) -> None:
        """Optimiser step with the gradients as they are now, clipped to ``clip_norm``; clears the gradients."""

    def skip_step(self) -> None:
        """Clear the gradients without an optimiser step: weights and optimiser state stay as they are."""

    def fragments(self, parameter: nn.Parameter) -> Sequence[tuple[Tensor, int]]:
        """What holds a part of this weight or of its optimiser state outside the model and ``optimizer.state[parameter]``.

        Each is a flat tensor and the index in ``parameter.flatten()`` where it starts. Optimiser state may appear with the first step.
        """

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The whole optimiser state: tensors of the parameter's shape, and ``step``, a scalar. All ranks call it, in the same order."""

    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put back a weight and what :meth:`state_of` gave, wherever the engine keeps them."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW. Weight decay spares what has one dimension (biases, normalisation), unless the configuration says otherwise."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or config.weight_decay_on_norm]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not config.weight_decay_on_norm]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # On a CPU the fused step rounds the last elements of a tensor (its size modulo 8) otherwise than the rest, so that weights would depend
    # on how ZeRO cuts them up.
    is_fused = session.device().type == "cuda"
    if config.optimizer == "adamw":
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), eps=config.eps, fused=is_fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=is_fused)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """The precision of forward passes, None for fp32. Parameters stay fp32, so there are no hidden master weights to mask."""
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
    """Plain torch: autocast, accumulation, one averaging all-reduce per step."""

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self._micro_batch = micro_batches_per_rank(config)
        self._wrap()

    def _wrap(self) -> None:
        """Take the model over: make the optimiser, and lay the weights out."""
        self.model = place_model(self.model, self.config)
        self.optimizer = build_optimizer(self.model, self.config)

    def backward(self, images: Tensor, labels: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        for inputs, targets in zip(torch.split(images, self._micro_batch), torch.split(labels, self._micro_batch), strict=True):
            loss = cross_entropy(self._logits(inputs).float(), targets, label_smoothing=self.config.label_smoothing)
            self._add_gradient(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean(), average_gradients(list(self.model.parameters()))

    def _logits(self, inputs: Tensor) -> Tensor:
        with torch.autocast(session.device().type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits: Tensor = self.model(inputs)
        return logits

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
        return {key: value.detach() for key, value in self.optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def set_state(self, parameter: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        parameter.copy_(weight)
        for key, value in state.items():
            like = parameter if value.shape == parameter.shape else value  # in the parameter's memory format
            self.optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(value)


def place_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """``model`` on this rank's device, in the configured memory format."""
    model = model.to(session.device())
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload, no-any-return]


def build_engine(model: nn.Module, config: TrainConfig) -> Engine:
    """Put ``model`` on this rank's device and wrap it in the configured engine. Weights must be equal on all ranks."""
    model = model.to(session.device())
    if config.engine == "torch":
        return TorchEngine(model, config)
    from pipeline.distributed.deepspeed_engine import DeepSpeedEngine, ShardedDeepSpeedEngine

    return (ShardedDeepSpeedEngine if config.zero_stage == 1 else DeepSpeedEngine)(model, config)

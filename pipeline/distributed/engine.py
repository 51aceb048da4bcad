"""The engine: backward, averaged gradients, optimiser step. The only place that knows DeepSpeed."""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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

        Afterwards every ``grad`` is dense and averaged over ranks and micro-batches.
        """

    def step(self) -> None:
        """Optimiser step; clears the gradients."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused SGD. Weight decay spares what has one dimension (biases, normalisation), unless the configuration says otherwise."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or config.weight_decay_on_norm]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not config.weight_decay_on_norm]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )


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

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.optimizer = build_optimizer(model, config)
        self._micro_batch = micro_batches_per_rank(config)

    def backward(self, images: Tensor, labels: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        _set_lr(self.optimizer, lr)
        losses: list[Tensor] = []
        for inputs, targets in zip(torch.split(images, self._micro_batch), torch.split(labels, self._micro_batch), strict=True):
            with torch.autocast(session.device().type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                logits = self.model(inputs)
            loss = cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
            (loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses).mean(), average_gradients(list(self.model.parameters()))

    def step(self) -> None:
        """See :class:`Engine`."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """DeepSpeed stage 0 with the same averaging as :class:`TorchEngine` in place of its own, which is measurably slower and denser."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no probing for accelerators
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        if not torch.cuda.is_available():
            # Compiles a shared-memory op for inference at start (a minute, and needs a compiler); training has no use for it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = config
        settings = {
            "train_micro_batch_size_per_gpu": micro_batches_per_rank(config),
            "gradient_accumulation_steps": config.accumulation,
            "zero_optimization": {"stage": 0},
            "gradient_clipping": 0.0,  # its default is 1.0, which silently trains another network
            "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
            **config.deepspeed,
        }
        self._engine, _, _, _ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config), config=settings)
        self._engine.enable_backward_allreduce = False
        self.model = self._engine.module
        self.optimizer = self._engine.basic_optimizer

    def backward(self, images: Tensor, labels: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        _set_lr(self.optimizer, lr)
        micro_batch = self._engine.train_micro_batch_size_per_gpu()
        losses: list[Tensor] = []
        for inputs, targets in zip(torch.split(images, micro_batch), torch.split(labels, micro_batch), strict=True):
            if losses:
                self._engine.step()  # DeepSpeed counts micro-batches here; no optimiser step before the last
            loss = cross_entropy(self._engine(inputs).float(), targets, label_smoothing=self.config.label_smoothing)
            self._engine.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean(), average_gradients(list(self.model.parameters()))

    def step(self) -> None:
        """See :class:`Engine`."""
        self._engine.step()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


ENGINES: dict[str, type[TorchEngine] | type[DeepSpeedEngine]] = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}


def place_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """``model`` on this rank's device, in the configured memory format."""
    model = model.to(session.device())
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload, no-any-return]


def build_engine(model: nn.Module, config: TrainConfig) -> Engine:
    """Put ``model`` on this rank's device and wrap it in the configured engine. Weights must be equal on all ranks."""
    engine: Engine = ENGINES[config.engine](model.to(session.device()), config)
    place_model(engine.model, config)  # only now: DeepSpeed's broadcast of the weights takes contiguous tensors
    return engine

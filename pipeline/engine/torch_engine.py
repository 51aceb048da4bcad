"""The engines of plain torch and DDP, and the optimisers of all engines."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
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
from pipeline.engine.average import WeightAverage
from pipeline.engine.compiled import compiled, compiling
from pipeline.engine.muon import MuonWithAdamW
from pipeline.engine.reduction import Reducer
from pipeline.engine.sgd import OnePassSGD
from pipeline.errors import ConfigError
from pipeline.sparse.values import parameters_of

logger = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the configured optimiser, a row of :data:`OPTIMIZERS`.

    Weight decay skips parameters with one dimension (biases, normalisation) unless
    ``train.weight_decay_on_norm`` is set.

    Raises:
        ConfigError: Muon is configured, and torch has none or the network has no matrix.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1 or config.weight_decay_on_norm]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not config.weight_decay_on_norm]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return OPTIMIZERS[config.optimizer](model, [group for group in groups if group["params"]], config)


def _build_sgd(model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return OnePassSGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)


def _build_adamw(model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    first, second = config.betas
    is_fused = session.device().type == "cuda"
    return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), eps=config.eps, fused=is_fused)


def _build_muon(model: nn.Module, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    taken = set(map(id, matrices))
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    rest = [group for group in rest if group["params"]]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"train.optimizer: torch {torch.__version__} has no Muon", do="install torch 2.9 or newer")
    if not matrices:
        raise ConfigError("train.optimizer: 'muon' found no matrix in the network", do="set train.optimizer=adamw")
    if session.is_main():
        sizes = [sum(p.numel() for p in part) for part in (matrices, *(group["params"] for group in rest))]
        logger.info("Muon: %s values in %d matrices; AdamW: %s others", sizes[0], len(matrices), sum(sizes[1:]))
    first, second = config.betas
    return MuonWithAdamW(
        matrices,
        rest,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        betas=(first, second),
        eps=config.eps,
        is_fused=session.device().type == "cuda",
    )


# name -> its builder, of (model, parameter groups with their weight decay, section train of the configuration). The
# learning rate of each step is set by the engine.
OPTIMIZERS: dict[str, Callable[[nn.Module, list[dict[str, Any]], TrainConfig], torch.optim.Optimizer]] = {
    "sgd": _build_sgd,
    "adamw": _build_adamw,
    "muon": _build_muon,
}


def _has_guard(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step changes nothing where ``optimizer.found_inf`` is 1, as torch's fused steps do."""
    return isinstance(optimizer, OnePassSGD) or all(group.get("fused") for group in optimizer.param_groups)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """Return the precision of forward passes, None for fp32.

    Parameters stay in fp32, so there are no hidden master weights to mask.
    """
    return torch.bfloat16 if config.precision == "bf16" else None


def micro_batches_per_rank(config: TrainConfig) -> int:
    """Return the number of samples in one micro-batch on one rank.

    Raises:
        ConfigError: the global batch cannot be divided evenly.
    """
    shares = session.world_size() * config.accumulation
    if config.global_batch % shares:
        raise ConfigError(
            f"train.global_batch: {config.global_batch} samples cannot be divided evenly among "
            f"{session.world_size()} ranks × {config.accumulation} micro-batches",
            do=f"choose a multiple of {shares}",
        )
    return config.global_batch // shares


class TorchEngine:
    """Plain torch: autocast, accumulation, and a :class:`Reducer` for the last micro-batch of a step."""

    optimizer: torch.optim.Optimizer
    _reports_gradients = False  # True: the engine reports every gradient to the reducer, which then sets no hooks

    def __init__(self, model: nn.Module, config: TrainConfig, waiting: Stopwatch | None = None) -> None:
        self.model = model
        self.config = config
        self._waiting = waiting or Stopwatch()  # for other ranks
        self._micro_batch = micro_batches_per_rank(config)
        self.average: WeightAverage | None = None
        if config.ema_decay:
            self.average = WeightAverage(model, config.ema_decay)  # before the engine wraps the network
            place_model(self.average.module, config)
        # what computes logits in training: the network, or its compiled form, which has the same parameters
        self._network = compiled(model) if config.compile else model
        self._wrap()
        self._reducer = Reducer(
            parameters_of(self.model),
            reduction=config.reduction,
            wire=config.wire,
            bucket_mb=config.bucket_mb,
            is_listening=not self._reports_gradients,
        )

    def _wrap(self) -> None:
        """Place the model on the device and build the optimiser."""
        self.model = place_model(self.model, self.config)
        self.optimizer = build_optimizer(self.model, self.config)

    def backward(
        self, images: Tensor, labels: Tensor, *, lr: float, dense: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Engine`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        are_right: list[Tensor] = []
        for inputs, targets in zip(
            torch.split(images, self._micro_batch), torch.split(labels, self._micro_batch), strict=True
        ):
            if len(losses) == self.config.accumulation - 1:
                self._reducer.start(dense=dense)
            with compiling() if self.config.compile else nullcontext():
                logits = self._logits(inputs).float()
                loss = cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
                self._add_gradient(loss)
            losses.append(loss.detach())
            classes = targets if targets.dim() == 1 else targets.argmax(dim=1)
            are_right.append(logits.detach().argmax(dim=1) == classes)
        with self._waiting:
            gradient_norm = self._reducer.finish()
        return torch.stack(losses).mean(), torch.cat(are_right).float().mean(), gradient_norm

    @property
    def masks_gradients(self) -> bool:
        """See :class:`Engine`."""
        return self._reducer.is_masked or (isinstance(self.optimizer, OnePassSGD) and self.optimizer.is_masking)

    def use_masks(self, masks: Mapping[str, Tensor]) -> None:
        """See :class:`Engine`."""
        self._reducer.use_masks(masks)
        if isinstance(self.optimizer, OnePassSGD) and self.config.clip_norm is None:  # the norm is of masked gradients
            held = parameters_of(self.model)
            self.optimizer.use_masks({held[name]: mask for name, mask in masks.items()})

    def _logits(self, inputs: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self._network(inputs)
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(session.device().type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _add_gradient(self, loss: Tensor) -> None:
        (loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self, is_bad: Tensor | None = None) -> None:
        """See :class:`Engine`."""
        if self.config.clip_norm is not None:  # the gradients are masked by now: the norm is that of the sparse network
            clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        is_guarded = _has_guard(self.optimizer)
        if is_guarded:
            self.optimizer.found_inf = is_bad  # type: ignore[attr-defined]
        if is_guarded or is_bad is None or not is_bad:
            self._optimizer_step()
        self._clear_gradients()
        if self.average is not None:
            self.average.update(self.model)

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
            like = parameter if value.shape == parameter.shape else value  # keeps the parameter's memory format
            self.optimizer.state[parameter][key] = torch.empty_like(
                like, dtype=value.dtype, device=parameter.device
            ).copy_(value)


# Each rank keeps its own BatchNorm statistics. Older versions of torch call the argument broadcast_buffers.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers": False
}


class DistributedDataParallelEngine(TorchEngine):
    """Torch's DistributedDataParallel, with a communication hook that hands gradients to the :class:`Reducer`.

    DDP decides with buckets of its own when gradients are ready, and holds their memory. Averaging
    is the same as in ``TorchEngine``, to the bit.
    """

    _reports_gradients = True

    def _wrap(self) -> None:
        super()._wrap()
        self._parallel: DistributedDataParallel | None = None
        if session.world_size() > 1:
            self._parallel = DistributedDataParallel(
                self._network,
                bucket_cap_mb=1,  # small, so that the hook is called early; the reducer has buckets of its own
                find_unused_parameters=True,
                gradient_as_bucket_view=True,  # saves a copy
                **_OWN_BUFFERS,
            )
            # A lambda, because DDP compares a function's annotations with types, and ours are strings.
            self._parallel.register_comm_hook(None, lambda state, bucket: self._hand_over(bucket))

    def _hand_over(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Report the gradients of a complete ``torch.distributed.GradBucket``."""
        for parameter in bucket.parameters():
            self._reducer.note(parameter)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        # unchanged, because ``finish`` writes the means into the gradients, which are views of it
        done.set_result(bucket.buffer())
        return done

    def _logits(self, inputs: Tensor) -> Tensor:
        if self._parallel is None:
            return super()._logits(inputs)
        with self._autocast(), nullcontext() if self._reducer.is_started else self._parallel.no_sync():
            logits: Tensor = self._parallel(inputs)
        return logits


def place_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Put ``model`` on this rank's device, in the configured memory format."""
    model = model.to(session.device())
    if not config.channels_last:
        return model
    take_pixels_before_convolving(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def take_pixels_before_convolving(model: nn.Module) -> None:
    """On a CPU, change narrow 1×1 convolutions with a stride: take every n-th pixel, then convolve without a stride.

    The result is the same. In channels-last format, oneDNN's weight gradient of such a layer writes
    behind the end of its buffer if the layer has fewer input channels than the processor's vectors
    have numbers (https://github.com/uxlfoundation/oneDNN/issues/6035, torch 2.14.1): the process
    crashes, or other numbers change.
    """
    if session.device().type != "cpu":
        return
    vector = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d) or type(layer).forward is not nn.Conv2d.forward:
            continue
        is_pointwise = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid") and layer.groups == 1
        if is_pointwise and layer.stride != (1, 1) and layer.in_channels < vector:
            layer.register_forward_pre_hook(functools.partial(_every_nth_pixel, layer.stride))
            layer.stride = (1, 1)


def _every_nth_pixel(stride: tuple[int, ...], layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][..., :: stride[0], :: stride[1]], *inputs[1:])

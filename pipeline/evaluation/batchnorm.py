"""BatchNorm statistics over all ranks: recalibration of a superposed network, and the average of what each rank has in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.distributed.session import world_size
from pipeline.errors import DataError


@torch.no_grad()
def recalibrate(model: nn.Module, micro_batches: Iterable[Tensor], *, autocast_dtype: torch.dtype | None = None) -> int:
    """Replace the model's BatchNorm statistics by those of the given images; returns the number of images, over all ranks.

    ``micro_batches`` ([images, channels, height, width] each) is this rank's share: micro-batch i
    of the whole belongs to rank i mod W. Each micro-batch normalises by itself, and a statistic is
    the mean over micro-batches weighted by their images, summed in float64 and over ranks: the
    result is that of one rank that has them all. Only BatchNorm layers are in training mode. A
    layer that no image reaches keeps its statistics. Every rank must call this, with the model
    itself, not a wrapper. Raises DataError, on all ranks, when no rank has an image.
    """
    layers = _layers(model)
    device = next(model.parameters()).device
    # One vector: for every layer Σ n·mean [C], Σ n·var [C], Σ n and the number of micro-batches; at
    # the end the number of images.
    sizes = [2 * _mean_of(layer).numel() + 2 for layer in layers.values()]
    sums = torch.zeros(sum(sizes) + 1, dtype=torch.float64, device=device)
    before = {name: (_mean_of(layer).clone(), _var_of(layer).clone()) for name, layer in layers.items()}
    with _observed(model, dict(zip(layers.values(), torch.split(sums[:-1], sizes), strict=True))):
        for images in micro_batches:
            with autocast(device, autocast_dtype):
                model(images.to(device, non_blocking=True))
            sums[-1] += len(images)
    _sum_over_ranks(sums)
    sums = sums.cpu()  # one host read for all layers
    if not sums[-1]:
        raise DataError(
            "no micro-batch to recalibrate BatchNorm with",
            do="lower evaluation.recalibration_batch: the training set has fewer images",
        )
    for (name, layer), of_layer in zip(layers.items(), torch.split(sums[:-1], sizes), strict=True):
        means, variances = of_layer[:-2].view(2, -1)
        num_images, num_batches = of_layer[-2:]
        new = (means / num_images, variances / num_images) if num_images else before[name]
        _mean_of(layer).copy_(new[0])
        _var_of(layer).copy_(new[1])
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(int(num_batches))
    return int(sums[-1])


@torch.no_grad()
def average_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The BatchNorm buffers of ``model`` by state_dict name, the floating ones averaged over ranks, as new tensors.

    In training each rank keeps statistics of its own; a ticket gets this average. The model is not
    changed. Every rank must call this.
    """
    buffers = {
        f"{name}.{key}" if name else key: buffer.detach().clone()
        for name, layer in _layers(model).items()
        for key, buffer in layer.named_buffers(recurse=False)
    }
    floating = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}
    if world_size() > 1 and floating:
        flat = torch.cat([buffer.double().flatten() for buffer in floating.values()])
        _sum_over_ranks(flat)
        parts = torch.split(flat / world_size(), [buffer.numel() for buffer in floating.values()])
        for buffer, part in zip(floating.values(), parts, strict=True):
            buffer.copy_(part.view(buffer.shape))
    return buffers


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards for every module the mode it had."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    """Autocast to ``dtype`` on that kind of device; nothing when it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def _observed(model: nn.Module, sums: dict[_BatchNorm, Tensor]) -> Iterator[None]:
    """Inside, every forward pass of a layer adds its batch statistics, weighted by the number of images, to the layer's sums."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(layer, _BatchNorm)
        num_images = len(inputs[0])
        statistics = torch.cat([_mean_of(layer), _var_of(layer)]).double()
        sums[layer][:-2] += num_images * statistics
        sums[layer][-2] += num_images
        sums[layer][-1] += 1

    momenta = {layer: layer.momentum for layer in sums}
    hooks = [layer.register_forward_hook(add) for layer in sums]
    try:
        with evaluating(model):
            for layer in sums:
                layer.reset_running_stats()  # 0·NaN of an earlier statistic would stay
                layer.momentum = 1.0  # so that the running statistics are those of the last batch alone
                layer.training = True
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values()), (
        "SyncBatchNorm mixes the batches of the ranks"
    )
    return layers


def _mean_of(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return layer.running_mean


def _var_of(layer: _BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var


def _sum_over_ranks(values: Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(values)

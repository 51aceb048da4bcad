"""BatchNorm statistics over all ranks: recalibrated for superposed networks, averaged for tickets."""

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
    """Replace the model's BatchNorm statistics by those of the given images.

    Each micro-batch is normalised on its own. A statistic is the mean over all micro-batches of all
    ranks, weighted by their numbers of images and summed in float64, so the result does not depend
    on the number of ranks. Only BatchNorm layers are in training mode. A layer that no image reaches
    keeps its statistics. Every rank must call this.

    Args:
        model: the model itself, not a wrapper such as DistributedDataParallel.
        micro_batches: this rank's share, each [images, channels, height, width]; micro-batch i of
            the whole belongs to rank i mod world_size.
        autocast_dtype: the type that the forward pass is autocast to; None: no autocast.

    Returns:
        The number of images, over all ranks.

    Raises:
        DataError: on all ranks, when no rank has an image.
    """
    layers = _layers(model)
    device = next(model.parameters()).device
    # One vector holds all sums: for every layer Σ n·mean [C], Σ n·var [C], Σ n and the number of
    # micro-batches, and at the end the number of images.
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
            "there is no full micro-batch to recalibrate BatchNorm with",
            do="lower evaluation.recalibration_batch to at most the number of training images",
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
    """Return copies of the BatchNorm buffers of ``model`` by state_dict name, averaged over ranks.

    During training each rank keeps its own statistics; a ticket gets their average. Integer buffers
    are not averaged. The model is not changed. Every rank must call this.
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
    """Put models into evaluation mode inside the block, and restore the mode of every module after it."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    """Return a context that autocasts to ``dtype`` on the type of ``device``, or does nothing if ``dtype`` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def _observed(model: nn.Module, sums: dict[_BatchNorm, Tensor]) -> Iterator[None]:
    """Inside the block, add the batch statistics of every forward pass to the layer's sums.

    They are weighted by the number of images.
    """

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
                layer.reset_running_stats()  # because a NaN in the old statistics would stay: 0·NaN is NaN
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

"""Normalise bytes of images on a CPU: in one pass over memory, with the bits of torch's three passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.compiled import compiled_once, is_compiling
from pipeline.memory import HUGE_PAGE, in_huge_pages


@compiled_once
def _normalise(images: Any, mean: Any, std: Any, out: Any) -> None:
    """Compute ``(images - mean) / std`` of images [n, size], with the mean and deviation of each place, [size]."""
    for image in range(len(images)):
        source, target = images[image], out[image]
        for i in range(len(source)):
            target[i] = (source[i] - mean[i]) / std[i]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(images - mean) / std`` in float32.

    Args:
        images: uint8 [n, 3, height, width] on the CPU.
        mean: float32 [1, 3, height, width], in the memory format of the result.
        std: likewise.
    """
    memory_format = torch.contiguous_format if mean.is_contiguous() else torch.channels_last
    # with several threads torch shares each of its passes among them
    is_alike = images.is_contiguous(memory_format=memory_format)
    if not is_compiling() or torch.get_num_threads() > 1 or not is_alike:
        return images.to(torch.float32, memory_format=memory_format).sub_(mean).div_(std)
    out = _empty_like(mean, len(images))
    _normalise(_rows(images), _rows(mean)[0], _rows(std)[0], _rows(out))
    return out


def _empty_like(image: Tensor, number: int) -> Tensor:
    """Return memory for images like ``image``, which has one: large batches in huge pages.

    The C library gives large memory back at once, so that each batch would meet new small pages, and
    that would take longer than the arithmetic.
    """
    size, shape = number * image.numel(), (number, *image.shape[1:])
    strides = (image.numel(), *image.stride()[1:])
    if 4 * size < HUGE_PAGE:
        return torch.empty_strided(shape, strides)
    return torch.from_numpy(in_huge_pages(4 * size).view(np.float32)).as_strided(shape, strides)


def _rows(images: Tensor) -> Any:
    """View the values of each image in the order of memory, [n, size]."""
    size = images[0].numel()
    return images.as_strided((len(images), size), (size, 1)).numpy()

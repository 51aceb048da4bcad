"""SGD's step on a CPU with masked gradients, in one pass over memory: compiled with numba, with the bits of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def is_available() -> bool:
    """Return whether :func:`step` can be used here.

    It computes with fused multiply-add, as torch does with AVX2 and AVX-512, and on one thread.
    """
    has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return has_fma and torch.get_num_threads() == 1 and _compiled() is not None


def step(
    tensors: Sequence[Sequence[Tensor]], *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    """Step weights and their momenta in place, with gradients of 0 where the masks are False.

    Args:
        tensors: for each weight, without gaps in memory and in the same layout: the mask (bool, True = active),
            the weight (float32, on the CPU), its gradient, which stays as it is, and, with momentum, its buffer.
        lr: learning rate.
        momentum: factor of the buffers.
        weight_decay: times the weights are added to the gradients.
        nesterov: use Nesterov momentum.
    """
    kernel = _compiled()
    assert kernel is not None
    rows = np.array([_row(*each) for each in tensors], np.int64)
    kernel(rows, np.float32(-lr), np.float32(momentum), np.float32(weight_decay), weight_decay != 0, nesterov)


def _row(mask: Tensor, weight: Tensor, gradient: Tensor, buffer: Tensor | None = None) -> tuple[int, ...]:
    at_buffer = 0 if buffer is None else buffer.data_ptr()
    return weight.data_ptr(), gradient.data_ptr(), at_buffer, mask.data_ptr(), weight.numel()


@functools.cache
def _compiled() -> Callable[..., None] | None:
    try:
        from pipeline.engine.masked_sgd_kernel import masked_step
    except ImportError:
        return None
    return masked_step  # type: ignore[no-any-return]

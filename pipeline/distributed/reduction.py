"""Gradient averaging over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed import session


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Replace every ``grad`` by its mean over ranks: one dense all-reduce of one flat buffer. Returns the norm of the result (a scalar).

    All ranks must have gradients for the same parameters. Every rank ends with the same bits.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert grads, "no gradient: call backward first"
    if session.world_size() == 1:
        return _norm(grads)
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= session.world_size()
    offset = 0
    for grad in grads:
        grad.copy_(flat[offset : offset + grad.numel()].view(grad.shape))
        offset += grad.numel()
    return _norm(grads)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms: list[Tensor] = torch._foreach_norm(list(tensors))  # type: ignore[assignment]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm

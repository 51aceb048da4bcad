from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support.samples import sample_provenance
from pipeline.tickets.format import Ticket


def _make_ticket(index: int = 0, *, seed: int = 0, **provenance: Any) -> Ticket:
    """Make a ticket of a small network.

    A convolution of 40 weights (8 active), a linear layer of 6 (3 active), a bias and a buffer.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {
        "conv.weight": torch.zeros(4, 5, 2, 1, dtype=torch.bool),
        "fc.weight": torch.tensor([[1, 0, 1], [0, 1, 0]]).bool(),
    }
    masks["conv.weight"].view(-1)[::5] = True
    state = {
        "conv.weight": torch.randn(4, 5, 2, 1, generator=generator) * masks["conv.weight"],
        "bn.num_batches_tracked": torch.tensor(7),
        "bn.running_mean": torch.randn(4, generator=generator),
        "fc.weight": torch.randn(2, 3, generator=generator) * masks["fc.weight"],
        "fc.bias": torch.tensor([0.5, -0.25]),
    }
    return Ticket(
        sample_provenance(index=index, **provenance),
        state,
        masks,
        frozenset({"bn.num_batches_tracked", "bn.running_mean"}),
    )


@pytest.fixture
def make_ticket() -> Callable[..., Ticket]:
    return _make_ticket
